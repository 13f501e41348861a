"""Token distributions as k + 1 buckets: the teacher's top-k, and one for all the rest (DESIGN §3).

Outside its top-k the teacher is taken proportional to the student, with the teacher's true tail mass. Every
token objective over the vocabulary then equals, value and gradient, the same objective over these buckets.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EMPTY = -1e30
"""Log-mass of a bucket that holds nothing. Finite: 0 · (EMPTY − EMPTY) is 0 where 0 · (−∞ + ∞) is NaN."""

_SMALLEST_TAIL = -16.1
"""Log of 1e-7, the resolution of float32 near 1: a smaller teacher tail cannot be told from it."""


def at_least_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half-precision tensors widened to float32; float32 and float64 as they are."""
    return x if x.dtype == torch.float64 else x.float()


def log1mexp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(1 − exp(x)) for x < 0, accurate at both ends. An x that rounding left at 0 or above counts as −1e-38."""
    x = torch.where(x < 0, x, -torch.finfo(x.dtype).tiny)
    near = x > -0.6931472
    small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, small, large)


def complement_logsumexp(logits: Float[Tensor, "n vocab"], ids: Int[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """logsumexp over the tokens that are *not* in `ids`; about EMPTY where none is left. Repeated ids are fine."""
    return torch.logsumexp(logits.scatter(1, ids, EMPTY), dim=1)


def student_buckets(
    logits: Float[Tensor, "n vocab"], ids: Int[Tensor, "n k"], kept: Bool[Tensor, "n k"], temperature: float
) -> Float[Tensor, "n buckets"]:
    """Log-probabilities (nats) of the student over the teacher's top-k and the tail, at `temperature`.

    `kept` is False at the padding of a shorter top-k list; there the id must repeat a kept one of its row.
    The result has k + 1 columns; padded columns, and a tail that holds no token, are EMPTY.
    """
    scaled = at_least_float32(logits) / temperature
    whole = torch.logsumexp(scaled, dim=1, keepdim=True)
    top = torch.where(kept, scaled.gather(1, ids) - whole, EMPTY)
    tail = (complement_logsumexp(scaled, ids)[:, None] - whole).clamp_min(EMPTY)
    return torch.cat([top, tail], dim=1)


def teacher_buckets(
    topk_logits: Float[Tensor, "n k"],
    kept: Bool[Tensor, "n k"],
    logsumexp: Float[Tensor, " n"],
    temperature: float,
    vocabulary: int,
) -> Float[Tensor, "n buckets"]:
    """Log-probabilities (nats) of the teacher over its top-k and its tail.

    `logsumexp` is over all logits at `temperature`, as cached. The tail is EMPTY where the top-k is the whole
    vocabulary of `vocabulary` tokens; elsewhere it is at least 1e-7, the resolution of float32.
    """
    top = torch.where(kept, at_least_float32(topk_logits) / temperature - at_least_float32(logsumexp)[:, None], EMPTY)
    tail = log1mexp(torch.logsumexp(top, dim=1)).clamp_min(_SMALLEST_TAIL)
    tail = torch.where(kept.sum(dim=1) < vocabulary, tail, EMPTY)
    return torch.cat([top, tail[:, None]], dim=1)
