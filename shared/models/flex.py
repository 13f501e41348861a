"""flex_attention under a block mask, which skips the tiles that a mask hides, for students and
teachers on CUDA. Kernel and mask are compiled once, for all shapes. On a CPU, where PyTorch has no
gradient for them, they run uncompiled, for tests: SDPA with a dense mask is used there.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface

from shared.models.loading import COMPILE

FLEX = "tide_flex"  # the name under which transformers' models find `attend_flex`
_compiled: Any = cache(partial(torch.compile, **COMPILE))


def block_mask(
    rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], like: Shaped[Tensor, "batch rows"]
) -> BlockMask:
    """Of a batch of the shape of `like`, where `rule(b, head, q, k)` says whether q sees k.

    Whatever differs between batches is a tensor in the rule, so nothing is compiled anew; the
    kernel reads it for every pair of a tile that is seen in part.
    """
    make = _compiled(create_block_mask) if like.is_cuda else create_block_mask
    batch, rows = like.shape
    return make(rule, batch, None, rows, rows, device=like.device)


def attend_flex(
    _module: Any,
    query: Float[Tensor, "batch heads length depth"],
    key: Float[Tensor, "batch kv_heads length depth"],
    value: Float[Tensor, "batch kv_heads length depth"],
    attention_mask: BlockMask,
    scaling: float | None = None,
    **_ignored: Any,
) -> tuple[Float[Tensor, "batch length heads depth"], None]:
    """transformers' contract of an attention function."""
    # Within a compiled layer it is compiled with it; another compiled function would cut the layer.
    alone = query.is_cuda and not torch.compiler.is_compiling()
    run = _compiled(flex_attention) if alone else flex_attention
    grouped = query.shape[1] != key.shape[1]
    out: Any = run(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(FLEX, attend_flex)
