"""The objectives as types: which distillation term, with which strength schedule (DESIGN §3).

These are settings only; the mathematics is in `student_train.losses`, schedules included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

_STRICT = ConfigDict(extra="forbid")

Axis = Literal["both", "training_only", "timestep_only"]
Growth = Literal["cosine", "linear"]
TimestepWeight = Literal["uniform", "midrange"]


@dataclass(frozen=True)
class Tidal:
    """TIDAL's strength λ over training progress and diffusion time (TIDE §2.1)."""

    __pydantic_config__ = _STRICT

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


@dataclass(frozen=True)
class NoDistillation:
    """CE alone: the undistilled student."""

    __pydantic_config__ = _STRICT
    type: Literal["none"] = "none"


@dataclass(frozen=True)
class _Tempered:
    __pydantic_config__ = _STRICT
    temperature: float = 2.0
    tidal: Tidal | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be positive")


@dataclass(frozen=True)
class KL(_Tempered):
    """KL(teacher ‖ student) over token logits; with `tidal`, the teacher is TIDAL's mixture."""

    type: Literal["kl"] = "kl"


@dataclass(frozen=True)
class ReverseKL(_Tempered):
    """KL(student ‖ teacher) over token logits."""

    type: Literal["reverse_kl"] = "reverse_kl"


@dataclass(frozen=True)
class Calm(_Tempered):
    """Forward CALM over chunk likelihoods."""

    type: Literal["calm"] = "calm"


@dataclass(frozen=True)
class ReverseCalm(_Tempered):
    """Reverse CALM over chunk likelihoods (TIDE §2.3)."""

    type: Literal["reverse_calm"] = "reverse_calm"


Distillation = Annotated[NoDistillation | KL | ReverseKL | Calm | ReverseCalm, Field(discriminator="type")]
TokenObjective = KL | ReverseKL
ChunkObjective = Calm | ReverseCalm
