"""TIDAL's targets over chunk probabilities (TIDE §2.1): between student and teacher, constant for the gradient.

Over token distributions the mixture is made where the logits are (`divergence`).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from student_train.losses.calm import bound_probability


@torch.no_grad()
def tidal_probability(
    student: Float[Tensor, " chunks"],
    teacher: Float[Tensor, " chunks"],
    strength: Float[Tensor, " chunks"],
) -> Float[Tensor, " chunks"]:
    """m = (1 − λ)·p_s + λ·p_t over chunk probabilities, bounded like a teacher's."""
    return bound_probability(student + strength * (teacher - student))
