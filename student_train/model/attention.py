"""The student's attention by flex_attention: a compiled block mask that skips what block diffusion hides.

On CUDA both the kernel and the mask are compiled once, for all shapes. On a CPU they run uncompiled and PyTorch has no
gradient for them, which is only good for tests: SDPA with the dense mask of `shared.attention` is used there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flex_attention_mask

FLEX = "tide_flex"
"""The name under which transformers' models find it."""


def flex_mask(valid: Bool[Tensor, "batch length"], block: int) -> BlockMask:
    """`shared.attention.block_diffusion_batch` (x_t before x_0) as a block mask.

    Whatever differs between batches is a tensor inside of it, so that nothing is compiled anew.
    """
    batch, length = valid.shape
    seen = valid.repeat(1, 2)
    half = torch.full((), length, device=valid.device)

    make = _compiled(create_block_mask) if valid.is_cuda else create_block_mask
    # A lambda, since tests wrap every `def` in checks of its types, which the compiler cannot read.
    return make(
        lambda b, _, q, k: (
            (seen[b, k] & (q // half == k // half) & (q % half // block == k % half // block))
            | (seen[b, k] & (k >= half) & (q % half // block > k % half // block))
            | (q == k)
        ),
        batch, None, 2 * length, 2 * length, device=valid.device,
    )  # fmt: skip


def register_flex() -> None:
    """Make the name known to transformers."""
    AttentionInterface.register(FLEX, _attend)
    AttentionMaskInterface.register(FLEX, flex_attention_mask)


def _attend(
    _module: Any,
    query: Float[Tensor, "batch heads length depth"],
    key: Float[Tensor, "batch kv_heads length depth"],
    value: Float[Tensor, "batch kv_heads length depth"],
    attention_mask: BlockMask,
    scaling: float | None = None,
    **_ignored: Any,
) -> tuple[Float[Tensor, "batch length heads depth"], None]:
    """transformers' contract of an attention function."""
    run = _compiled(flex_attention) if query.is_cuda else flex_attention
    grouped = query.shape[1] != key.shape[1]
    out: Any = run(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
