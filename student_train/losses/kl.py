"""KL divergences between token distributions, one value per position (DESIGN §3).

Inputs are log-probabilities over the same buckets: a vocabulary, or a top-k with its tail (`buckets`). Nothing is
reduced here: the caller weights, sums, multiplies by T² and divides once by the number of masked positions.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def kl(log_target: Float[Tensor, "n buckets"], log_student: Float[Tensor, "n buckets"]) -> Float[Tensor, " n"]:
    """KL(target ‖ student) in nats: Σ p (log p − log q)."""
    return (log_target.exp() * (log_target - log_student)).sum(dim=-1)


def reverse_kl(log_target: Float[Tensor, "n buckets"], log_student: Float[Tensor, "n buckets"]) -> Float[Tensor, " n"]:
    """KL(student ‖ target) in nats: Σ q (log q − log p)."""
    return (log_student.exp() * (log_student - log_target)).sum(dim=-1)
