"""Attention as one operator that computes nothing: in place of kernels that exist on a GPU alone (flex, flash)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from transformers import AttentionInterface, AttentionMaskInterface

REHEARSED = "tide_rehearsed"


@torch.library.custom_op(
    "tide::rehearsed_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, int pairs) -> (Tensor, Tensor)",
)
def _forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Output, and the logarithm of each row's sum, which the backward pass needs. Content is not computed."""
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op(
    "tide::rehearsed_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor sums, int pairs) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    _grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@_backward.register_fake
def _(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, pairs = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.pairs = pairs


def _differentiate(ctx: Any, grad: Tensor, _sums: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *torch.ops.tide.rehearsed_attention_backward(grad, *ctx.saved_tensors, ctx.pairs), None


_forward.register_autograd(_differentiate, setup_context=_keep)


@register_flop_formula(torch.ops.tide.rehearsed_attention)
def _flops(q: Any, _k: Any, v: Any, pairs: int, **_: Any) -> int:
    """Two products of every pair that sees each other, in every head."""
    return 2 * pairs * q[1] * (q[-1] + v[-1])


@register_flop_formula(torch.ops.tide.rehearsed_attention_backward)
def _flops_backward(
    _grad: Any, q: Any, _k: Any, v: Any, _out: Any, _sums: Any, pairs: int, **_: Any
) -> int:
    """Five products where forward has two."""
    return 5 * pairs * q[1] * (q[-1] + v[-1])


def rehearse_attention(model: Any, pairs: int) -> None:
    """The model attends in name only. `pairs`: how many pairs of rows see each other, in one head of the batch."""

    def attend(
        _module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any = None, **_: Any
    ) -> tuple[Tensor, None]:
        out, _sums = torch.ops.tide.rehearsed_attention(query, key, value, pairs)
        return out.transpose(1, 2), None

    AttentionInterface.register(REHEARSED, attend)
    AttentionMaskInterface.register(REHEARSED, lambda *_, attention_mask=None, **__: attention_mask)
    model.set_attn_implementation(REHEARSED)


@register_flop_formula(torch.ops.aten._grouped_mm)
def _flops_of_experts(rows: Any, experts: Any, *_: Any, **__: Any) -> int:
    """Every row meets one expert: of `rows` [n, width] and `experts` [e, width, made]."""
    return 2 * rows[0] * rows[1] * experts[-1]
