"""What distillation measures, one value per position or chunk, and TIDAL, which moves its target.

An objective is a function of the student's side and the teacher's. Ours are `kl` and `reverse_kl`
of log-probabilities, which state their gradients too, and `calm` and `reverse_calm` of chunks; one
of the user's own is the method `loss` of its settings (`own_values`).

* KL and reverse KL over the vocabulary (`token_divergence`)
* CALM and Reverse CALM over chunk likelihoods (TIDE §2.3). The student enters as log p_s ≤ 0
  (already divided by T) and is never clamped: that would zero the gradient just where it is most
  wrong. Only the fixed teacher is bounded.
* TIDAL (TIDE §2.1): how far the target lies from the student towards the teacher. λ depends on
  training progress τ = step / max_steps and on diffusion time t.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from shared.cache.levels import EMPTY
from shared.settings.config import Taught, Tidal, TimestepWeight
from shared.system.files import TideError
from student_train.losses.targets import (
    MappedTargets,
    TopKTargets,
    log_student,
    teacher_log_weights,
)

TEACHER_BOUND = 1e-7


def at_least_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half-precision tensors widened to float32; float32 and float64 as they are."""
    return x if x.dtype == torch.float64 else x.float()


def own_values(settings: Taught, student: Tensor, teacher: Tensor) -> Float[Tensor, " n"]:
    """What an objective of the user's own measures."""
    own: Any = settings
    values = own.loss(student, teacher)
    if values.shape != student.shape[:1]:
        what = f"loss of {settings.type} gave the shape {list(values.shape)}"
        raise TideError(what, expected=f"a value a row of the student's: [{len(student)}]")
    return values


def token_divergence(
    logits: Float[Tensor, "n vocab"],
    topk: TopKTargets | MappedTargets,
    settings: Taught,
    strength: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, " n"]:
    """Per position what the objective measures at its temperature, such as KL(target ‖ student) in
    nats; no T².

    The target is the teacher, or with `strength` λ TIDAL's mixture
    softmax((1 − λ)·s/T + λ·z/T); constant for the gradient. Unshared ids have no part in either.
    """
    wide = at_least_float32(logits)
    if settings.type in _WITH_GRADIENT:
        return _Divergence.apply(wide, topk, settings, strength)  # type: ignore
    student = log_student(wide, topk, settings.temperature)
    with torch.no_grad():
        target = log_target(student.detach(), topk, settings.temperature, strength)
    return own_values(settings, student, target)


class _Divergence(torch.autograd.Function):
    """The gradient is made in forward, in the two dense tensors that the value needs anyway."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Float[Tensor, "n vocab"],
        topk: TopKTargets | MappedTargets,
        settings: Taught,
        strength: Float[Tensor, " n"] | None,
    ) -> Float[Tensor, " n"]:
        student = log_student(logits, topk, settings.temperature)
        target = log_target(student, topk, settings.temperature, strength)
        value, gradient = _WITH_GRADIENT[settings.type](student, target)
        ctx.save_for_backward(gradient.div_(settings.temperature))
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0][:, None], None, None, None


def log_target(
    student: Float[Tensor, "n vocab"],
    topk: TopKTargets | MappedTargets,
    temperature: float,
    strength: Float[Tensor, " n"] | None,
) -> Float[Tensor, "n vocab"]:
    """log r, the teacher or TIDAL's mixture of it and the student log q, both at `temperature`."""
    # 1. log p, the teacher but for a constant.                                          (n, vocab)
    if isinstance(topk, MappedTargets):
        # r = A + rest · q: what maps nowhere stays in the student's own shape.
        target = student.exp().mul_(topk.rest[:, None]).add_(topk.mass)
        target = target.clamp_min_(torch.finfo(target.dtype).tiny).log_()
    else:
        target = teacher_log_weights(topk, temperature, student.dtype)
    # 2. TIDAL's target: (1 − λ)·log q + λ·log p, which is (1 − λ)·s/T + λ·z/T but for a constant.
    if strength is not None:
        part = strength.to(student.dtype)[:, None]
        target.mul_(part).addcmul_(student, 1 - part)
    return target.sub_(torch.logsumexp(target, dim=1, keepdim=True))


# The two give D of each row and T·∂D/∂s, in the memory of their arguments.


def kl(
    student: Float[Tensor, "n vocab"], target: Float[Tensor, "n vocab"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n vocab"]]:
    """D = Σ r·(log r − log q), ∂D/∂s = (q − r) / T."""
    probability = target.exp()
    value = torch.linalg.vecdot(probability, target.sub_(student))
    return value, student.exp_().sub_(probability)


def reverse_kl(
    student: Float[Tensor, "n vocab"], target: Float[Tensor, "n vocab"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n vocab"]]:
    """D = Σ q·(log q − log r), ∂D/∂s = q·((log q − log r) − D) / T."""
    log_ratio = student - target
    student.exp_()
    value = torch.linalg.vecdot(student, log_ratio)
    return value, log_ratio.sub_(value[:, None]).mul_(student)


_WITH_GRADIENT: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "kl": kl, "reverse_kl": reverse_kl
}  # fmt: skip


def token_log_likelihood(
    logits: Float[Tensor, "n vocab"], gold: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """log p(gold) in nats, accurate also where p is within float32's resolution of 1."""
    logits = at_least_float32(logits)
    # With s the gold logit and o = logsumexp of all others, p = 1 / (1 + exp(o − s)), so
    # log p = −softplus(o − s). log_softmax would round to 0 near p = 1 and lose 1 − p.
    others = torch.logsumexp(logits.scatter(1, gold[:, None], EMPTY), dim=1)
    return -F.softplus(others - logits.gather(1, gold[:, None]).squeeze(1), threshold=80.0)


def chunk_log_likelihood(
    token_logp: Float[Tensor, " n"],
    rows: Int[Tensor, " tokens"],
    chunk_of: Int[Tensor, " tokens"],
    chunks: int,
) -> Float[Tensor, " chunks"]:
    """log p(c) = Σ log p(gold token) over its tokens: token_logp[rows] summed by `chunk_of`, which
    rises. In one order always: `index_add` adds in any on CUDA.
    """
    edges = torch.searchsorted(chunk_of, torch.arange(chunks + 1, device=chunk_of.device))
    return torch.segment_reduce(token_logp[rows], "sum", offsets=edges, unsafe=True, initial=0.0)


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


def training_strength(tidal: Tidal, progress: float) -> float:
    """λ_train = λ_init + (λ_max − λ_init)·g(τ), where g is (1 − cos πτ)/2, or τ."""
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress is {progress}; it must lie in [0, 1] (step / max_steps)")
    growth = (1.0 - math.cos(math.pi * progress)) / 2 if tidal.growth == "cosine" else progress
    return tidal.lambda_init + (tidal.lambda_max - tidal.lambda_init) * growth


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
    """m = (1 − λ)·p_s + λ·p_t over chunk probabilities, bounded as a teacher's; no gradient.

    Over tokens the mixture is made where the logits are (`log_target`).
    """
    return bound_probability(student + strength * (teacher - student))
