"""KL and reverse KL between the teacher (or TIDAL's mixture) and the student over the vocabulary, with their gradient.

The target is dense, so nothing is left to autograd: forward makes the gradient in the tensors that it needs anyway
(student, target; two of the logits' size beside them), and backward scales it.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shared.cache.levels import EMPTY
from student_train.losses.log_masses import at_least_float32
from student_train.losses.tail import fit, teacher_log_probabilities
from student_train.losses.targets import TopKTargets


def token_divergence(
    logits: Float[Tensor, "n vocab"],
    topk: TopKTargets,
    temperature: float,
    strength: Float[Tensor, " n"] | None,
    reverse: bool,
) -> Float[Tensor, " n"]:
    """Per position KL(target ‖ student), or KL(student ‖ target), at `temperature`, in nats; no T² factor.

    The target is the teacher, or with `strength` λ TIDAL's mixture softmax((1 − λ)·s/T + λ·z/T); constant for the
    gradient. Ids that are not shared have no part in either side (TIDE's reference).
    """
    return _Divergence.apply(at_least_float32(logits), topk, temperature, strength, reverse)  # type: ignore[no-any-return]


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        topk: TopKTargets,
        temperature: float,
        strength: Tensor | None,
        reverse: bool,
    ) -> Tensor:
        value, gradient = divergence_and_gradient(logits, topk, temperature, strength, reverse)
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
    """The divergence of each row, and its derivative by that row's logits."""
    student = log_student(logits, topk, temperature)
    target = teacher_log_probabilities(topk, student, temperature)
    if strength is not None:  # (1 − λ)·s/T + λ·z/T, but for a constant
        part = strength.to(student.dtype)[:, None]
        target.mul_(part).addcmul_(student, 1 - part)
    target -= torch.logsumexp(target, dim=1, keepdim=True)
    if reverse:
        apart = student - target
        student.exp_()
        value = torch.linalg.vecdot(student, apart)
        return value, apart.sub_(value[:, None]).mul_(student).div_(temperature)
    mass = target.exp()
    value = torch.linalg.vecdot(mass, target.sub_(student))
    return value, student.exp_().sub_(mass).div_(temperature)


def log_student(
    logits: Float[Tensor, "n vocab"], topk: TopKTargets, temperature: float
) -> Float[Tensor, "n vocab"]:
    """The student's log-probabilities at `temperature` over the shared ids; EMPTY at the others."""
    scaled = logits / temperature
    unshared = _unshared(topk, logits.shape[1])
    if unshared is not None:
        scaled.masked_fill_(unshared, EMPTY)
    return scaled.sub_(torch.logsumexp(scaled, dim=1, keepdim=True))


def _unshared(topk: TopKTargets, width: int) -> Bool[Tensor, " vocab"] | None:
    return None if topk.classes is None else fit(topk.classes.class_of, width, -1) < 0
