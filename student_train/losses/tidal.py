"""TIDAL's interpolated targets (TIDE §2.1): between the student and the teacher, constant for the gradient."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from student_train.losses.calm import bound_probability


@torch.no_grad()
def tidal_distribution(
    log_teacher: Float[Tensor, "n buckets"], log_student: Float[Tensor, "n buckets"], strength: Float[Tensor, " n"]
) -> Float[Tensor, "n buckets"]:
    """Log of r = softmax((1 − λ)·s/T + λ·z/T), from log-probabilities at T.

    Over a top-k with its tail this is exact: inside the tail teacher and student are proportional, so their
    geometric mixture acts on the tail's mass as a whole.
    """
    mixed = (1 - strength[:, None]) * log_student + strength[:, None] * log_teacher
    return torch.log_softmax(mixed, dim=-1)


@torch.no_grad()
def tidal_probability(
    student: Float[Tensor, " chunks"], teacher: Float[Tensor, " chunks"], strength: Float[Tensor, " chunks"]
) -> Float[Tensor, " chunks"]:
    """m = (1 − λ)·p_s + λ·p_t over chunk probabilities, bounded like a teacher's."""
    return bound_probability(student + strength * (teacher - student))
