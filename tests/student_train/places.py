"""Places of [x_t ; x_0] for tests that look at more than training needs."""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


def all_places(lengths: Sequence[int]) -> Int[Tensor, "batch rows"]:
    """Every real place of [x_t ; x_0], for those who look at more than the masked positions."""
    width = max(lengths)
    column = torch.arange(2 * width)
    return torch.where(column % width < torch.tensor(lengths)[:, None], column, -1)


def in_float64(model: Any) -> Any:
    """The model in float64 throughout: transformers' norms compute in float32."""

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return (
            self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(norm, module)
    return model.double()
