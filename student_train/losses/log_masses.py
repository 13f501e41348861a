"""Log-masses, accurate where probabilities come close to 0 and to 1."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shared.cache.levels import EMPTY


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


def complement_logsumexp(
    logits: Float[Tensor, "n vocab"], ids: Int[Tensor, "n k"]
) -> Float[Tensor, " n"]:
    """logsumexp over the tokens that are *not* in `ids`; about EMPTY where none is left. Repeated ids are fine."""
    return torch.logsumexp(logits.scatter(1, ids, EMPTY), dim=1)
