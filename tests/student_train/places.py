"""Places of [x_t ; x_0] for tests that look at more than training needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def all_places(lengths: Sequence[int]) -> Int[Tensor, "batch rows"]:
    """Every real place of [x_t ; x_0], for those who look at more than the masked positions."""
    width = max(lengths)
    column = torch.arange(2 * width)
    return torch.where(column % width < torch.tensor(lengths)[:, None], column, -1)
