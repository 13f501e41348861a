"""TIDAL's strength λ and timestep weight as functions of progress τ and diffusion time t (TIDE §2.1)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from shared.settings.objectives import Growth, Tidal, TimestepWeight

_MIDRANGE_CENTRE, _MIDRANGE_WIDTH = 0.5, 0.15


def growth(progress: float, kind: Growth) -> float:
    """g(τ) from 0 to 1: (1 − cos πτ)/2, or τ."""
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress is {progress}; it must lie in [0, 1] (step / max_steps)")
    return (1.0 - math.cos(math.pi * progress)) / 2 if kind == "cosine" else progress


def training_strength(tidal: Tidal, progress: float) -> float:
    """λ_train = λ_init + (λ_max − λ_init)·g(τ)."""
    return tidal.lambda_init + (tidal.lambda_max - tidal.lambda_init) * growth(
        progress, tidal.growth
    )


def strength(tidal: Tidal, progress: float, t: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """λ per position or chunk, by axis: λ_train·(1 − t), λ_train, or λ_max·(1 − t)."""
    return strength_at(tidal, training_strength(tidal, progress), t)


def strength_at(
    tidal: Tidal, train: float | Float[Tensor, ""], t: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """`strength` from λ_train, which may be a tensor: a compiled loss must not be made anew at every step."""
    match tidal.axis:
        case "both":
            return train * (1.0 - t)
        case "training_only":
            return train * torch.ones_like(t)
        case "timestep_only":
            return tidal.lambda_max * (1.0 - t)


def timestep_weight(kind: TimestepWeight, t: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """1, or exp(−(t − 0.5)² / (2·0.15²))."""
    if kind == "uniform":
        return torch.ones_like(t)
    return torch.exp(-((t - _MIDRANGE_CENTRE) ** 2) / (2 * _MIDRANGE_WIDTH**2))
