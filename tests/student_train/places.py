"""A small student, and places of [x_t ; x_0] for tests that look at more than training needs."""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Qwen3ForCausalLM

from student_train.using.settings import Special

SPECIAL = Special(mask=49, eos=48)


def small(vocabulary: int = 50, kind: Any = Qwen3ForCausalLM) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    heads |= {"no_rope_layer_interval": 2, "pad_token_id": None}
    config = kind.config_class(vocab_size=vocabulary, **shape, **heads, initializer_range=0.1)
    return kind(config).eval()


def whole_logits(model: Any, ids: list[int], padding: int, block: int) -> Tensor:
    """By one pass over everything; `padding` on the left is hidden."""
    index = torch.arange(len(ids)) // block
    seen = (index[:, None] >= index[None]) & (torch.arange(len(ids)) >= padding)[None]
    seen |= torch.eye(len(ids), dtype=torch.bool)
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids]), attention_mask=seen[None, None], use_cache=False)
        return model.lm_head(hidden.last_hidden_state)[0].double()


def all_places(lengths: Sequence[int]) -> Int[Tensor, "batch rows"]:
    """Every real place of [x_t ; x_0], for those who look at more than the masked positions."""
    width = max(lengths)
    column = torch.arange(2 * width)
    places = column + 2 * width * torch.arange(len(lengths))[:, None]
    return torch.where(column % width < torch.tensor(lengths)[:, None], places, -1)


def in_float64(model: Any) -> Any:
    """The model in float64 throughout: transformers' norms compute in float32."""

    def norm(self: Any, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(variance + self.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(norm, module)
    return model.double()
