"""The objectives as types: which distillation term, with which strength schedule (DESIGN §3).

These are settings only; the mathematics is in `student_train.losses`, schedules included.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from shared.settings.variants import BY_TYPE, Variant, strict, variant

Axis = Literal["both", "training_only", "timestep_only"]
Growth = Literal["cosine", "linear"]
TimestepWeight = Literal["uniform", "midrange"]


@strict
class Tidal:
    """TIDAL's strength λ over training progress and diffusion time (TIDE §2.1)."""

    lambda_init: float = 0.1
    lambda_max: float = 0.9
    axis: Axis = "both"
    growth: Growth = "cosine"
    timestep_weight: TimestepWeight = "uniform"

    def __post_init__(self) -> None:
        if not 0 <= self.lambda_init <= self.lambda_max <= 1:
            raise ValueError(
                f"lambda_init {self.lambda_init} and lambda_max {self.lambda_max} must keep "
                "0 ≤ lambda_init ≤ lambda_max ≤ 1"
            )


@variant("none")
class NoDistillation(Variant):
    """CE alone: the undistilled student."""


@strict
class _Tempered(Variant):
    temperature: float = 2.0
    tidal: Tidal | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be positive")


@strict
class _OverTokens(_Tempered):
    tail: Literal["cache", "prior", "student"] = "cache"
    """What the teacher is taken for outside its top-k: as the cache says, or another way for an ablation."""


@variant("kl")
class KL(_OverTokens):
    """KL(teacher ‖ student) over token logits; with `tidal`, the teacher is TIDAL's mixture."""


@variant("reverse_kl")
class ReverseKL(_OverTokens):
    """KL(student ‖ teacher) over token logits."""


@variant("calm")
class Calm(_Tempered):
    """Forward CALM over chunk likelihoods."""


@variant("reverse_calm")
class ReverseCalm(_Tempered):
    """Reverse CALM over chunk likelihoods (TIDE §2.3)."""


Distillation = Annotated[NoDistillation | KL | ReverseKL | Calm | ReverseCalm, BY_TYPE]
TokenObjective = KL | ReverseKL
ChunkObjective = Calm | ReverseCalm
