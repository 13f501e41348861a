"""KL and reverse KL over the vocabulary between the student and the teacher, or TIDAL's mixture.

Cached of the teacher are its top-k and, for the rest, the mass M_c of each class of tokens. The
dense teacher is made of them here, beside the student's logits:

    log p̂(v) = log p(v)                                               v in the top-k
             = log M_c + log b(v) − log Σ b(u)   over u in c, outside   v of class c, outside

where b is the shape inside a class: the teacher's prior, or the student. With the student's shape
value and gradient are those of a divergence over k + C buckets.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from shared.cache.levels import EMPTY
from student_train.losses.calm import at_least_float32
from student_train.losses.targets import TopKTargets


def token_divergence(
    logits: Float[Tensor, "n vocab"],
    topk: TopKTargets,
    temperature: float,
    strength: Float[Tensor, " n"] | None,
    reverse: bool,
) -> Float[Tensor, " n"]:
    """Per position KL(target ‖ student), or KL(student ‖ target), at `temperature`, in nats; no T².

    The target is the teacher, or with `strength` λ TIDAL's mixture
    softmax((1 − λ)·s/T + λ·z/T); constant for the gradient. Unshared ids have no part in either.
    """
    wide = at_least_float32(logits)
    return _Divergence.apply(wide, topk, temperature, strength, reverse)  # type: ignore


class _Divergence(torch.autograd.Function):
    """The gradient is made in forward, in the two dense tensors that the value needs anyway."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *settings: Any) -> Tensor:
        value, gradient = divergence_and_gradient(logits, *settings)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0][:, None], None, None, None, None


def divergence_and_gradient(
    logits: Float[Tensor, "n vocab"],
    topk: TopKTargets,
    temperature: float,
    strength: Float[Tensor, " n"] | None,
    reverse: bool,
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n vocab"]]:
    """The divergence of each row, and its derivative by that row's logits. float32 or wider."""
    # 1. log q, the student, and log p, the teacher, at T.                              (n, vocab)
    student = log_student(logits, topk, temperature)
    target = teacher_log_probabilities(topk, student, temperature)
    # 2. TIDAL's target: (1 − λ)·log q + λ·log p, which is (1 − λ)·s/T + λ·z/T but for a constant.
    if strength is not None:
        part = strength.to(student.dtype)[:, None]
        target.mul_(part).addcmul_(student, 1 - part)
    # 3. Normalised: log r.
    target -= torch.logsumexp(target, dim=1, keepdim=True)
    if reverse:
        # 4. D = Σ q·(log q − log r), ∂D/∂s = q·((log q − log r) − D) / T.
        log_ratio = student - target
        student.exp_()
        value = torch.linalg.vecdot(student, log_ratio)
        return value, log_ratio.sub_(value[:, None]).mul_(student).div_(temperature)
    # 4. D = Σ r·(log r − log q), ∂D/∂s = (q − r) / T.
    probability = target.exp()
    value = torch.linalg.vecdot(probability, target.sub_(student))
    return value, student.exp_().sub_(probability).div_(temperature)


def log_student(
    logits: Float[Tensor, "n vocab"], topk: TopKTargets, temperature: float
) -> Float[Tensor, "n vocab"]:
    """The student's log-probabilities at `temperature` over the shared ids; EMPTY at the others."""
    scaled = logits / temperature
    if topk.classes is not None:
        scaled.masked_fill_(fit(topk.classes.class_of, logits.shape[1], -1) < 0, EMPTY)
    return scaled.sub_(torch.logsumexp(scaled, dim=1, keepdim=True))


def teacher_log_probabilities(
    topk: TopKTargets, log_student: Float[Tensor, "n vocab"], temperature: float
) -> Float[Tensor, "n vocab"]:
    """The dense teacher log p̂ at `temperature`, in nats, in a tensor of its own.

    `log_student`: the student's log-probabilities at the same temperature, EMPTY at unshared ids.
    """
    dtype, width = log_student.dtype, log_student.shape[1]
    # 1. The top-k: softmax of its logits at T, times its mass 1 − tail = sigmoid(−odds).    (n, k)
    scaled = torch.where(topk.kept, topk.logp / temperature, EMPTY)
    in_topk = F.logsigmoid(-topk.odds[temperature])[:, None]
    top = (torch.log_softmax(scaled, dim=1) + in_topk).to(dtype)
    # Padding repeats the row's first id, so it must write that id's value too.
    top = torch.where(topk.kept, top, top[:, :1])

    # 2. log M_c, the mass of each class outside the top-k.                            (n, classes)
    if topk.class_mass is None:
        log_mass = F.logsigmoid(topk.odds[temperature].to(dtype))[:, None]
    else:
        log_mass = topk.class_mass[temperature].to(dtype)

    # 3. log b(v), and log Σ b(u) of each class outside the top-k.            (vocab), (n, classes)
    if topk.student_shaped or topk.classes is None:
        log_shape = log_student
        log_left = _student_outside(topk, log_student, log_mass.shape[1])
    else:
        log_shape = fit(topk.classes.log_prior[temperature].to(dtype), width, EMPTY)
        log_left = _prior_outside(topk, temperature, log_mass.shape[1]).to(dtype)

    # 4. log p̂ = log M_c − log Σ b(u) + log b(v), and the top-k in its places.          (n, vocab)
    height = log_mass - log_left.clamp_min(-1e4)
    if topk.classes is None or height.shape[1] == 1:
        dense = log_shape + height
    else:
        dense = height[:, fit(topk.classes.class_of, width, -1).clamp_min(0)]
        dense += log_shape
    return dense.scatter_(1, topk.ids, top).clamp_min_(EMPTY)


def fit(values: Tensor, width: int, fill: int | float) -> Tensor:
    """A table over the teacher's vocabulary for a student of `width` rows: cut, or filled up."""
    missing = width - values.shape[0]
    return values[:width] if missing <= 0 else F.pad(values, (0, missing), value=fill)


def _student_outside(
    topk: TopKTargets, log_student: Float[Tensor, "n vocab"], count: int
) -> Float[Tensor, "n classes"]:
    """Log of the student's mass in each class outside the top-k."""
    outside = log_student.scatter(1, topk.ids, EMPTY)  # (n, vocab)
    if count == 1 or topk.classes is None:
        return torch.logsumexp(outside, dim=1, keepdim=True)
    class_of = fit(topk.classes.class_of, log_student.shape[1], -1)
    members = F.one_hot(class_of.clamp_min(0), count).to(outside.dtype)  # (vocab, classes)
    members *= (class_of >= 0)[:, None]
    return (outside.exp() @ members).clamp_min(torch.finfo(outside.dtype).tiny).log()


def _prior_outside(topk: TopKTargets, temperature: float, count: int) -> Float[Tensor, "n classes"]:
    """Log of the prior's mass in each class outside the top-k, in float64."""
    # Where the top-k has nearly all of a class's prior, the rest is a small difference.
    assert topk.classes is not None
    class_of = topk.classes.class_of
    prior = topk.classes.log_prior[temperature].double().exp()  # (vocab)
    taken = prior[topk.ids] * topk.kept  # (n, k)
    if count == 1:
        whole = prior.sum()[None]
        taken = taken.sum(dim=1, keepdim=True)
    else:
        whole = torch.zeros(count, dtype=prior.dtype, device=prior.device)
        whole = whole.index_add(0, class_of.clamp_min(0), prior)
        classes = torch.arange(count, device=prior.device)
        belongs = class_of[topk.ids][:, :, None] == classes  # (n, k, classes)
        taken = torch.einsum("nk,nkc->nc", taken, belongs.double())
    return (whole - taken).clamp_min(1e-12 * whole + 1e-300).log()
