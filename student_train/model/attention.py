"""The student's attention by flex_attention: a compiled block mask that skips what block diffusion hides.

On CUDA both the kernel and the mask are compiled once, for all shapes. On a CPU they run uncompiled and PyTorch has no
gradient for them, which is only good for tests: SDPA with the dense mask of `shared.diffusion.attention` is used there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flex_attention_mask

FLEX = "tide_flex"
"""The name under which transformers' models find it."""


def flex_mask(
    places: Int[Tensor, "batch rows"], length: int, block: int, draws: int = 1
) -> BlockMask:
    """`shared.diffusion.attention.block_diffusion_places` as a block mask.

    Whatever differs between batches is a tensor inside of it, so that nothing is compiled anew.
    """
    batch, rows = places.shape
    blocks, copies, seen = places % length // block, places // length, places >= 0
    clean = copies == draws

    make = _compiled(create_block_mask) if places.is_cuda else create_block_mask
    # A lambda, since tests wrap every `def` in checks of its types, which the compiler cannot read.
    return make(
        lambda b, _, q, k: (
            (seen[b, k] & (copies[b, q] == copies[b, k]) & (blocks[b, q] == blocks[b, k]))
            | (seen[b, k] & clean[b, k] & (blocks[b, q] > blocks[b, k]))
            | (q == k)
        ),
        batch, None, rows, rows, device=places.device,
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
