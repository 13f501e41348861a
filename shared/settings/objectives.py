"""The objectives as types: which distillation term, with which strength schedule.

These are settings only; the mathematics is in `student_train.losses`, schedules included.
"""

from typing import Annotated, Literal

from shared.settings.build import BY_TYPE, Positive, require, strict

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
        require(
            0 <= self.lambda_init <= self.lambda_max <= 1,
            f"lambda_init is {self.lambda_init} and lambda_max {self.lambda_max}, "
            "expected 0 ≤ lambda_init ≤ lambda_max ≤ 1",
        )


@strict
class NoDistillation:
    """CE alone: the undistilled student."""

    type: Literal["none"] = "none"


@strict
class _Tempered:
    temperature: Positive = 2.0
    tidal: Tidal | None = None


@strict
class _OverTokens(_Tempered):
    tail: Literal["cache", "prior", "student"] = "cache"
    """What stands for the teacher outside its top-k: as the cache says, or another to compare."""


@strict
class KL(_OverTokens):
    """KL(teacher ‖ student) over token logits; with `tidal`, the teacher is TIDAL's mixture."""

    type: Literal["kl"] = "kl"


@strict
class ReverseKL(_OverTokens):
    """KL(student ‖ teacher) over token logits."""

    type: Literal["reverse_kl"] = "reverse_kl"


@strict
class Calm(_Tempered):
    """Forward CALM over chunk likelihoods."""

    type: Literal["calm"] = "calm"


@strict
class ReverseCalm(_Tempered):
    """Reverse CALM over chunk likelihoods (TIDE §2.3)."""

    type: Literal["reverse_calm"] = "reverse_calm"


Distillation = Annotated[NoDistillation | KL | ReverseKL | Calm | ReverseCalm, BY_TYPE]
TokenObjective = KL | ReverseKL
ChunkObjective = Calm | ReverseCalm
