"""What the losses know of the teacher, as tensors: at each masked position, in each active chunk.

`slice_targets` cuts them by rows, so that logits need not exist for a whole batch. Cached of the
teacher are its top-k and, for the rest, the mass M_c of each class of tokens; the dense teacher is
made of them here (`teacher_log_probabilities`), beside the student's logits:

    log p̂(v) = log p(v)                                               v in the top-k
             = log M_c + log b(v) − log Σ b(u)   over u in c, outside   v of class c, outside

where b is the shape inside a class: the teacher's prior, or the student. With the student's shape
value and gradient are those of a divergence over k + C buckets.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from shared.cache.levels import EMPTY


@dataclass(frozen=True)
class Classes:
    """The vocabulary cut into classes. `class_of` is −1 at ids that only one of the models has."""

    class_of: Int[Tensor, " vocab"]
    count: int
    # By temperature: log of the teacher's mean probability outside its top-k, in nats.
    log_prior: Mapping[float, Float[Tensor, " vocab"]]


@dataclass(frozen=True)
class TopKTargets:
    """The teacher at the first n masked positions: all of them, or those at which it was read."""

    ids: Int[Tensor, "n k"]
    logp: Float[Tensor, "n k"]  # at T = 1 in nats, up to a constant of the row
    kept: Bool[Tensor, "n k"]  # False at padding, where `ids` repeats the row's first id
    # By temperature: log-odds of the mass outside the top-k, and log-masses of its classes.
    odds: Mapping[float, Float[Tensor, " n"]]
    classes: Classes | None = None  # None: one, no unshared ids, and the student's shape
    class_mass: Mapping[float, Float[Tensor, "n classes"]] | None = None  # None: one class
    student_shaped: bool = True  # inside a class proportional to the student; else to the prior


@dataclass(frozen=True)
class ChunkTargets:
    """Active chunks. Token j of them stands at masked row `rows[j]`, in chunk `chunk_of[j]`.

    Both rise with j. `host`, where given, is the two as an array (2, tokens) in host memory: slices
    are then cut without waiting for the device.
    """

    rows: Int[Tensor, " tokens"]
    chunk_of: Int[Tensor, " tokens"]
    teacher_logp: Float[Tensor, " chunks"]
    t: Float[Tensor, " chunks"]
    host: np.ndarray | None = None


@dataclass(frozen=True)
class Targets:
    """What the losses need of a batch besides the student's logits at its n masked positions."""

    gold: Int[Tensor, " n"]
    t: Float[Tensor, " n"]
    topk: TopKTargets | None = None
    chunks: ChunkTargets | None = None


def rows_of(topk: TopKTargets, part: slice) -> TopKTargets:
    """The targets of some rows, as views."""
    odds = {t: values[part] for t, values in topk.odds.items()}
    mass = topk.class_mass
    if mass is not None:
        mass = {t: values[part] for t, values in mass.items()}
    ids, logp, kept = topk.ids[part], topk.logp[part], topk.kept[part]
    return replace(topk, ids=ids, logp=logp, kept=kept, odds=odds, class_mass=mass)


def slice_targets(targets: Targets, size: int) -> Iterator[tuple[slice, Targets]]:
    """The targets cut into runs of about `size` rows, none of which parts the rows of one chunk.

    Sums over the parts add up to those over the whole.
    """
    n, chunks = targets.gold.shape[0], targets.chunks
    # 1. Rows and chunks of the chunks' tokens, in host memory.                        (2, tokens)
    tokens = np.zeros((2, 0), np.int64)
    if chunks is not None and n > size:
        tokens = chunks.host
        if tokens is None:
            tokens = torch.stack([chunks.rows, chunks.chunk_of]).cpu().numpy()
    rows, owner = tokens

    # 2. Edges 0 … n: steps of `size`, moved back to where two rows are not of one chunk, or
    # forward where one chunk alone is longer than a slice.
    inside = np.zeros(n + 1, bool)
    inside[rows[1:][owner[1:] == owner[:-1]]] = True
    allowed = np.flatnonzero(~inside)
    edges = [0]
    while edges[-1] < n:
        i = int(np.searchsorted(allowed, edges[-1] + size, side="right")) - 1
        if allowed[i] <= edges[-1]:
            i += 1
        edges.append(int(allowed[i]))

    # 3. Each part's own rows, chunks and tokens, counted from its first. Since rows and chunks
    # rise, these are views.
    for start, end in itertools.pairwise(edges):
        part, own = slice(start, end), None
        if chunks is not None and end - start == n:
            own = replace(chunks, host=None)
        elif chunks is not None:
            first, last = (int(i) for i in np.searchsorted(rows, [start, end]))
            low, high = 0, 0
            if last > first:
                low, high = int(owner[first]), int(owner[last - 1]) + 1
            own = ChunkTargets(
                chunks.rows[first:last] - start,
                chunks.chunk_of[first:last] - low,
                chunks.teacher_logp[low:high],
                chunks.t[low:high],
            )
        topk = None if targets.topk is None else rows_of(targets.topk, part)
        yield part, Targets(targets.gold[part], targets.t[part], topk, own)


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
        log_left = _prior_outside(topk, topk.classes, temperature, log_mass.shape[1]).to(dtype)

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


def _prior_outside(
    topk: TopKTargets, classes: Classes, temperature: float, count: int
) -> Float[Tensor, "n classes"]:
    """Log of the prior's mass in each class outside the top-k, in float64."""
    # Where the top-k has nearly all of a class's prior, the rest is a small difference.
    prior = classes.log_prior[temperature].double().exp()  # (vocab)
    taken = prior[topk.ids] * topk.kept  # (n, k)
    if count == 1:
        whole = prior.sum()[None]
        taken = taken.sum(dim=1, keepdim=True)
    else:
        whole = torch.zeros(count, dtype=prior.dtype, device=prior.device)
        whole = whole.index_add(0, classes.class_of.clamp_min(0), prior)
        numbers = torch.arange(count, device=prior.device)
        belongs = classes.class_of[topk.ids][:, :, None] == numbers  # (n, k, classes)
        taken = torch.einsum("nk,nkc->nc", taken, belongs.double())
    return (whole - taken).clamp_min(1e-12 * whole + 1e-300).log()
