"""loss = CE + weight · distillation (DESIGN §3): from logits at masked positions and cached targets to sums.

Everything returned is a sum over the batch beside its own count. The caller adds sums and counts over accumulated
batches and processes and divides once, so that the gradient is that of one large batch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from shared.settings.objectives import (
    KL,
    Calm,
    ChunkObjective,
    Distillation,
    NoDistillation,
    ReverseCalm,
    ReverseKL,
)
from student_train.losses import calm, denoise, tidal
from student_train.losses.divergence import token_divergence
from student_train.losses.log_masses import at_least_float32
from student_train.losses.schedules import strength_at, timestep_weight, training_strength
from student_train.losses.targets import ChunkTargets, Targets, rows_of


@dataclass(frozen=True)
class Counts:
    """The denominators: maskable tokens (CE), tokens that the teacher was read at (token objectives), active chunks
    (chunk objectives).
    """

    maskable: Float[Tensor, ""]
    read: Float[Tensor, ""]
    chunks: Float[Tensor, ""]


@dataclass(frozen=True)
class Sums:
    """Sums over the batch, before any division: cross-entropy, distillation."""

    denoise: Float[Tensor, ""]
    distillation: Float[Tensor, ""]


def objective(
    logits: Float[Tensor, "n vocab"], targets: Targets, distillation: Distillation, progress: float
) -> Sums:
    """The two sums for student `logits` (one row per masked position). `progress` is τ = step / max_steps.

    Raises ValueError where the batch lacks what the objective needs.
    """
    return objective_at(logits, targets, distillation, lambda_train(distillation, progress))


def lambda_train(distillation: Distillation, progress: float) -> float:
    """TIDAL's λ_train at τ; 0 for objectives without it."""
    tidal_settings = getattr(distillation, "tidal", None)
    return 0.0 if tidal_settings is None else training_strength(tidal_settings, progress)


def objective_at(
    logits: Float[Tensor, "n vocab"],
    targets: Targets,
    distillation: Distillation,
    train: float | Float[Tensor, ""],
) -> Sums:
    """`objective` from λ_train (`lambda_train`), which may be a tensor."""
    logits = at_least_float32(logits)
    ce = denoise.denoise(logits, targets.gold, targets.t).sum()
    if isinstance(distillation, NoDistillation):
        extra = torch.zeros((), device=logits.device)
    elif isinstance(distillation, KL | ReverseKL):
        extra = _token_term(logits, targets, distillation, train)
    else:
        token_logp = calm.token_log_likelihood(logits, targets.gold)
        extra = _chunk_term(token_logp, targets, distillation, train)
    return Sums(ce, extra)


def gold_objective(
    token_logp: Float[Tensor, " n"],
    targets: Targets,
    distillation: NoDistillation | ChunkObjective,
    progress: float,
) -> Sums:
    """`objective` where it asks the student for nothing but log p(gold token), in nats: CE alone, or with chunks."""
    ce = -(token_logp / targets.t).sum()
    if isinstance(distillation, NoDistillation):
        return Sums(ce, torch.zeros((), device=token_logp.device))
    return Sums(
        ce, _chunk_term(token_logp, targets, distillation, lambda_train(distillation, progress))
    )


def on_device(targets: Targets) -> Targets:
    """The targets without what is in host memory, which only cutting them needs."""
    chunks = targets.chunks
    return (
        targets
        if chunks is None
        else dataclasses.replace(targets, chunks=dataclasses.replace(chunks, host=None))
    )


def slice_targets(targets: Targets, size: int) -> Iterator[tuple[slice, Targets]]:
    """The targets cut into runs of about `size` rows, none of which parts the rows of one chunk.

    Sums over the parts add up to those over the whole. A chunk's rows must follow each other, as `collate` has them.
    """
    n = targets.gold.shape[0]
    chunks = targets.chunks
    host = _on_host(chunks) if n > size and chunks is not None else np.zeros((2, 0), np.int64)
    edges = _edges(host, n, size)
    for start, end in itertools.pairwise(edges):
        part = slice(start, end)
        topk = None
        if targets.topk is not None:
            topk = rows_of(targets.topk, part)
        own = chunks
        if chunks is not None and len(edges) > 2:
            own = _slice_chunks(chunks, host, start, end)
        yield part, Targets(targets.gold[part], targets.t[part], topk, own)


def _on_host(chunks: ChunkTargets) -> np.ndarray:
    return (
        chunks.host
        if chunks.host is not None
        else torch.stack([chunks.rows, chunks.chunk_of]).cpu().numpy()
    )


def _edges(host: np.ndarray, n: int, size: int) -> list[int]:
    """0, …, n: steps of `size`, moved back where they would part a chunk."""
    if n <= size:
        return [0, n] if n else []
    rows, owner = host
    inside = np.zeros(n + 1, bool)
    inside[rows[1:][owner[1:] == owner[:-1]]] = True
    allowed = np.flatnonzero(~inside).tolist()
    edges, i = [0], 0
    while edges[-1] < n:
        wanted = edges[-1] + size
        while i + 1 < len(allowed) and allowed[i + 1] <= wanted:
            i += 1
        if allowed[i] <= edges[-1]:  # one chunk longer than a slice
            i += 1
        edges.append(allowed[i])
    return edges


def _slice_chunks(chunks: ChunkTargets, host: np.ndarray, start: int, end: int) -> ChunkTargets:
    """The chunks whose tokens stand at rows start … end − 1: views, since both numbers rise."""
    first, last = (int(x) for x in np.searchsorted(host[0], [start, end]))
    own = host[:, first:last]
    low, high = (int(own[1, 0]), int(own[1, -1]) + 1) if last > first else (0, 0)
    tokens, mine = slice(first, last), slice(low, high)
    moved = own - np.array([[start], [low]])
    return ChunkTargets(
        chunks.rows[tokens] - start,
        chunks.chunk_of[tokens] - low,
        chunks.teacher_logp[mine],
        chunks.t[mine],
        moved,
    )


def _token_term(
    logits: Float[Tensor, "n vocab"],
    targets: Targets,
    settings: KL | ReverseKL,
    train: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    topk, temperature = targets.topk, settings.temperature
    if topk is None or temperature not in topk.odds:
        raise ValueError(f"the batch has no top-k targets at temperature {temperature}")
    read = topk.ids.shape[0]
    if not read:
        return logits.sum() * 0.0
    logits, t = logits[:read], targets.t[:read]
    weight, mixed = torch.ones_like(t), None
    if settings.tidal is not None:
        mixed = strength_at(settings.tidal, train, t)
        weight = timestep_weight(settings.tidal.timestep_weight, t)
    if settings.tail != "cache":
        topk = dataclasses.replace(topk, student_shaped=settings.tail == "student")
    values = token_divergence(logits, topk, temperature, mixed, isinstance(settings, ReverseKL))
    return temperature**2 * (weight * values).sum()


def _chunk_term(
    token_logp: Float[Tensor, " n"],
    targets: Targets,
    settings: ChunkObjective,
    train: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    chunks, temperature = targets.chunks, settings.temperature
    if chunks is None:
        raise ValueError("the batch has no chunk targets")
    count = chunks.teacher_logp.shape[0]
    student = (
        calm.chunk_log_likelihood(token_logp, chunks.rows, chunks.chunk_of, count) / temperature
    )
    target = calm.bound_probability((chunks.teacher_logp.to(token_logp.dtype) / temperature).exp())
    weight = torch.ones_like(chunks.t)
    if settings.tidal is not None:
        target = tidal.tidal_probability(
            student.exp(), target, strength_at(settings.tidal, train, chunks.t)
        )
        weight = timestep_weight(settings.tidal.timestep_weight, chunks.t)
    term = calm.calm if isinstance(settings, Calm) else calm.reverse_calm
    return (weight * term(student, target)).sum()


def parts_of(
    sums: Sums, counts: Counts, distillation: Distillation
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """CE per maskable token, distillation per read token or active chunk. A count of 0 contributes 0."""
    denoised = sums.denoise / counts.maskable.clamp_min(1)
    match distillation:
        case NoDistillation():
            return denoised, torch.zeros_like(denoised)
        case KL() | ReverseKL():
            return denoised, sums.distillation / counts.read.clamp_min(1)
        case Calm() | ReverseCalm():
            return denoised, sums.distillation / counts.chunks.clamp_min(1)


def total(
    sums: Sums, counts: Counts, distillation: Distillation, weight: float
) -> Float[Tensor, ""]:
    """loss = CE + weight · distillation, each divided by its own count."""
    denoised, distilled = parts_of(sums, counts, distillation)
    return denoised if isinstance(distillation, NoDistillation) else denoised + weight * distilled
