"""CALM and Reverse CALM over chunk likelihoods (TIDE §2.3), one value per chunk.

The student enters as log p_s ≤ 0 (already divided by T) and is never clamped: a clamp would zero the gradient just
where the student is most wrong. Only the fixed teacher is bounded, to [1e-7, 1 − 1e-7].
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from student_train.losses.log_masses import at_least_float32, complement_logsumexp, log1mexp

TEACHER_BOUND = 1e-7


def token_log_likelihood(
    logits: Float[Tensor, "n vocab"], gold: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """log p(gold) in nats, accurate also where p is within float32's resolution of 1.

    log p = −softplus(logsumexp of the others − gold logit); log_softmax would round to 0 there and lose 1 − p.
    """
    logits = at_least_float32(logits)
    ids = gold[:, None]
    return -F.softplus(
        complement_logsumexp(logits, ids) - logits.gather(1, ids).squeeze(1), threshold=80.0
    )


def chunk_log_likelihood(
    token_logp: Float[Tensor, " n"],
    rows: Int[Tensor, " tokens"],
    chunk_of: Int[Tensor, " tokens"],
    chunks: int,
) -> Float[Tensor, " chunks"]:
    """log p(c) = Σ log p(gold token) over the chunk's tokens: token_logp[rows] summed by `chunk_of`."""
    total = torch.zeros(chunks, dtype=token_logp.dtype, device=token_logp.device)
    return total.index_add(0, chunk_of, token_logp[rows])


def bound_probability(p: Float[Tensor, " chunks"]) -> Float[Tensor, " chunks"]:
    """A fixed target's probability in [1e-7, 1 − 1e-7]."""
    return p.clamp(TEACHER_BOUND, 1.0 - TEACHER_BOUND)


def calm(
    log_student: Float[Tensor, " chunks"], target: Float[Tensor, " chunks"]
) -> Float[Tensor, " chunks"]:
    """Forward: −(p_t log p_s + (1 − p_t) log(1 − p_s))."""
    return -(target * log_student + (1 - target) * log1mexp(log_student))


def reverse_calm(
    log_student: Float[Tensor, " chunks"], target: Float[Tensor, " chunks"]
) -> Float[Tensor, " chunks"]:
    """Reverse: −(p_s log p_t + (1 − p_s) log(1 − p_t)). Its derivative by p_s is −logit(p_t): bounded."""
    p = log_student.exp()
    return -(p * torch.log(target) + (1 - p) * torch.log1p(-target))
