"""The teacher over the whole vocabulary from what is cached of it: its top-k, and a shape for the rest (DESIGN §3).

log p̂(v) = log p(v) in the top-k, else log M_c + log b(v) − log Σ_{u in c, outside the top-k} b(u), where M_c is the
cached mass of v's class c outside the top-k and b the shape inside of it: the teacher's prior, or the student. With the
student's shape this is the bucket objective: value and gradient of each divergence are those over k + C buckets.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from shared.cache.levels import EMPTY
from student_train.losses.targets import Classes, TopKTargets


def top_log_probabilities(topk: TopKTargets, temperature: float) -> Float[Tensor, "n k"]:
    """Log-probabilities (nats) of the kept ids at `temperature`; EMPTY at padding."""
    scaled = torch.where(topk.kept, topk.logp / temperature, EMPTY)
    return torch.log_softmax(scaled, dim=1) + F.logsigmoid(-topk.odds[temperature])[:, None]


def teacher_log_probabilities(
    topk: TopKTargets, log_student: Float[Tensor, "n vocab"], temperature: float
) -> Float[Tensor, "n vocab"]:
    """Log-probabilities (nats) of the teacher at `temperature` over the vocabulary, in a tensor of their own.

    `log_student`: the student's at the same temperature, EMPTY where ids are not shared; for its shape inside the tail.
    """
    classes = topk.classes
    top = top_log_probabilities(topk, temperature).to(log_student.dtype)
    # At padding the id of the row's first entry stands, and so must its value.
    top = torch.where(topk.kept, top, top[:, :1])
    odds = topk.odds[temperature].to(log_student.dtype)
    if topk.class_mass is None:
        mass = F.logsigmoid(odds)[:, None]
    else:
        mass = topk.class_mass[temperature].to(log_student.dtype)
    width = log_student.shape[1]
    if topk.student_shaped or classes is None:
        base = log_student
        left = _left_of_student(log_student, topk.ids, classes, mass.shape[1])
    else:
        base = fit(classes.log_prior[temperature].to(log_student.dtype), width, EMPTY)
        left = _left_of_prior(classes, topk.ids, topk.kept, temperature, mass.shape[1]).to(
            log_student.dtype
        )
    height = mass - left.clamp_min(-1e4)
    if classes is None or height.shape[1] == 1:
        made = base + height
    else:
        made = height[:, fit(classes.class_of, width, -1).clamp_min(0)]
        made += base
    return made.scatter_(1, topk.ids, top).clamp_min_(EMPTY)


def fit(values: Tensor, width: int, fill: int | float) -> Tensor:
    """A table of the teacher's vocabulary for a student of `width` rows: cut, or filled up."""
    missing = width - values.shape[0]
    return values[:width] if missing <= 0 else F.pad(values, (0, missing), value=fill)


def _left_of_prior(
    classes: Classes,
    ids: Int[Tensor, "n k"],
    kept: Bool[Tensor, "n k"],
    temperature: float,
    count: int,
) -> Float[Tensor, "n classes"]:
    """Log of each class's prior mass outside the top-k. In float64: where the top-k has nearly all of a class's prior,
    what is left is a small difference.
    """
    prior, own = classes.log_prior[temperature].double().exp(), classes.class_of
    if count == 1:
        whole = prior.sum()[None]
        taken = (prior[ids] * kept).sum(dim=1, keepdim=True)
    else:
        belongs = torch.arange(count, device=ids.device)
        whole = torch.zeros(count, dtype=prior.dtype, device=ids.device).index_add(
            0, own.clamp_min(0), prior
        )
        of_ids = own[ids][:, :, None] == belongs
        taken = torch.einsum("nk,nkc->nc", prior[ids] * kept, of_ids.double())
    return (whole - taken).clamp_min(1e-12 * whole + 1e-300).log()


def _left_of_student(
    log_student: Float[Tensor, "n vocab"],
    ids: Int[Tensor, "n k"],
    classes: Classes | None,
    count: int,
) -> Float[Tensor, "n classes"]:
    """Log of the student's mass in each class outside the top-k."""
    outside = log_student.scatter(1, ids, EMPTY)
    if count == 1 or classes is None:
        return torch.logsumexp(outside, dim=1, keepdim=True)
    own = fit(classes.class_of, log_student.shape[1], -1)
    members = F.one_hot(own.clamp_min(0), count).to(outside.dtype) * (own >= 0)[:, None]
    return (outside.exp() @ members).clamp_min(torch.finfo(outside.dtype).tiny).log()
