"""TIDAL (TIDE §2.1): how far the target lies from the student towards the teacher, and when.

λ depends on training progress τ = step / max_steps and on diffusion time t. Over chunk
probabilities the mixture is made here; over tokens where the logits are (`divergence`).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from shared.settings.objectives import Growth, Tidal, TimestepWeight
from student_train.losses.calm import bound_probability


def growth(progress: float, kind: Growth) -> float:
    """g(τ) from 0 to 1: (1 − cos πτ)/2, or τ."""
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress is {progress}; it must lie in [0, 1] (step / max_steps)")
    return (1.0 - math.cos(math.pi * progress)) / 2 if kind == "cosine" else progress


def training_strength(tidal: Tidal, progress: float) -> float:
    """λ_train = λ_init + (λ_max − λ_init)·g(τ)."""
    rise = tidal.lambda_max - tidal.lambda_init
    return tidal.lambda_init + rise * growth(progress, tidal.growth)


def strength_at(
    tidal: Tidal, train: float | Float[Tensor, ""], t: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """λ per position or chunk, by axis: λ_train·(1 − t), λ_train, or λ_max·(1 − t).

    `train` is λ_train; a tensor for a compiled loss, which a new number would compile anew.
    """
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
    return torch.exp(-((t - 0.5) ** 2) / (2 * 0.15**2))


@torch.no_grad()
def tidal_probability(
    student: Float[Tensor, " chunks"],
    teacher: Float[Tensor, " chunks"],
    strength: Float[Tensor, " chunks"],
) -> Float[Tensor, " chunks"]:
    """m = (1 − λ)·p_s + λ·p_t over chunk probabilities, bounded as a teacher's; no gradient."""
    return bound_probability(student + strength * (teacher - student))
