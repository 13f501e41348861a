"""CALM and Reverse CALM over chunk likelihoods (TIDE §2.3), one value per chunk.

The student enters as log p_s ≤ 0 (already divided by T) and is never clamped: a clamp would zero
the gradient just where the student is most wrong. Only the fixed teacher is bounded.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from shared.cache.levels import EMPTY

TEACHER_BOUND = 1e-7


def at_least_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half-precision tensors widened to float32; float32 and float64 as they are."""
    return x if x.dtype == torch.float64 else x.float()


def token_log_likelihood(
    logits: Float[Tensor, "n vocab"], gold: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """log p(gold) in nats, accurate also where p is within float32's resolution of 1."""
    logits = at_least_float32(logits)
    # With s the gold logit and o = logsumexp of all others, p = 1 / (1 + exp(o − s)), so
    # log p = −softplus(o − s). log_softmax would round to 0 near p = 1 and lose 1 − p.
    others = complement_logsumexp(logits, gold[:, None])
    return -F.softplus(others - logits.gather(1, gold[:, None]).squeeze(1), threshold=80.0)


def complement_logsumexp(
    logits: Float[Tensor, "n vocab"], ids: Int[Tensor, "n k"]
) -> Float[Tensor, " n"]:
    """logsumexp over the tokens *not* in `ids` (repeats are fine); about EMPTY for no token."""
    return torch.logsumexp(logits.scatter(1, ids, EMPTY), dim=1)


def chunk_log_likelihood(
    token_logp: Float[Tensor, " n"],
    rows: Int[Tensor, " tokens"],
    chunk_of: Int[Tensor, " tokens"],
    chunks: int,
) -> Float[Tensor, " chunks"]:
    """log p(c) = Σ log p(gold token) over its tokens: token_logp[rows] summed by `chunk_of`."""
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
    """Reverse: −(p_s log p_t + (1 − p_s) log(1 − p_t)). Its slope −logit(p_t) is bounded."""
    p = log_student.exp()
    return -(p * torch.log(target) + (1 - p) * torch.log1p(-target))


def log1mexp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(1 − exp(x)) for x < 0, accurate at both ends. An x that rounding left ≥ 0 is −1e-38."""
    # Both branches get inputs that are valid for them: where() would spread the other's NaN.
    x = torch.where(x < 0, x, -torch.finfo(x.dtype).tiny)
    near = x > -0.6931472  # −log 2: exp(x) > 1/2
    small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, small, large)
