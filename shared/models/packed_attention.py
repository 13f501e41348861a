"""Full attention over sequences that lie one behind the other: no padding, and no mask.

transformers' models find it as the attention implementation `tide_packed`. The sequences' ends come
as keyword arguments of the forward, under the names of transformers' own packed batches.
"""

import itertools
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

PACKED = "tide_packed"


def use_packed_attention(model: Any) -> None:
    """From now on the model takes packed batches (`packed_arguments`) and no others."""
    AttentionInterface.register(PACKED, _attend)
    model.set_attn_implementation(PACKED)


def packed_arguments(ends: Int[Tensor, " edges"], longest: int) -> dict[str, Any]:
    """What the forward of such a model takes beside ids and positions.

    `ends`: 0, and where each sequence ends, int32; `longest`: tokens of the longest.
    """
    # Of four dimensions, so that transformers makes none of its own; nobody reads it.
    unread = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=ends.device)
    return {"attention_mask": unread, "cu_seq_lens_q": ends, "max_length_q": longest}


def _attend(
    _module: Any,
    query: Float[Tensor, "1 heads rows depth"],
    key: Float[Tensor, "1 kv_heads rows depth"],
    value: Float[Tensor, "1 kv_heads rows depth"],
    _mask: Tensor | None = None,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[Float[Tensor, "1 rows heads depth"], None]:
    """transformers' contract of an attention function."""
    ends, longest = arguments["cu_seq_lens_q"], arguments["max_length_q"]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    grouped = query.shape[1] != key.shape[1]
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        out: Any = varlen_attn(
            q, k, v, ends, ends, longest, longest, scale=scale, enable_gqa=grouped
        )
        return out[None], None
    return torch.ops.tide.packed_attention(query, key, value, ends, scale), None


# One operator, so that a compiled layer is the same for any number of sequences.
_SCHEMA = "(Tensor query, Tensor key, Tensor value, Tensor ends, float scale) -> Tensor"


@torch.library.custom_op("tide::packed_attention", mutates_args=(), schema=_SCHEMA)
def _one_by_one(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, scale: float) -> Tensor:
    """Sequence by sequence, where PyTorch has no kernel for all: on a CPU, and in float32."""
    out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
    grouped = query.shape[1] != key.shape[1]
    for start, end in itertools.pairwise(ends.tolist()):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        one = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
        out[:, start:end] = one.transpose(1, 2)
    return out


@_one_by_one.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
