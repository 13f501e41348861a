"""loss = CE + weight · distillation, from logits at masked positions and cached targets.

Everything is a sum over the batch beside its own count. The caller adds sums and counts over
accumulated batches and processes and divides once, so the gradient is that of one large batch.
"""

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from shared.settings.objectives import (
    KL,
    Calm,
    Distillation,
    NoDistillation,
    ReverseCalm,
    ReverseKL,
)
from student_train.losses import calm, tidal
from student_train.losses.calm import at_least_float32
from student_train.losses.divergence import token_divergence
from student_train.losses.targets import Targets


@dataclass(frozen=True)
class Counts:
    """The denominators: of CE, of objectives over tokens, of objectives over chunks."""

    maskable: Float[Tensor, ""]
    read: Float[Tensor, ""]
    """Masked positions at which the teacher was read."""
    chunks: Float[Tensor, ""]
    """Active ones."""


@dataclass(frozen=True)
class Sums:
    """Sums over the batch before any division: weighted cross-entropy, distillation."""

    denoise: Float[Tensor, ""]
    distillation: Float[Tensor, ""]


def denoise(
    logits: Float[Tensor, "n vocab"], gold: Int[Tensor, " n"], t: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """The denoising loss of masked diffusion, w(t)·(−log p(gold)) in nats, with w(t) = 1/t."""
    return F.cross_entropy(at_least_float32(logits), gold, reduction="none") / t


def objective(
    logits: Float[Tensor, "n vocab"], targets: Targets, distillation: Distillation, progress: float
) -> Sums:
    """The two sums for student `logits`, a row per masked position. `progress` is τ.

    Raises ValueError where the batch lacks what the objective needs.
    """
    return objective_at(logits, targets, distillation, lambda_train(distillation, progress))


def lambda_train(distillation: Distillation, progress: float) -> float:
    """TIDAL's λ_train at τ; 0 for objectives without it."""
    settings = getattr(distillation, "tidal", None)
    return 0.0 if settings is None else tidal.training_strength(settings, progress)


def objective_at(
    logits: Float[Tensor, "n vocab"],
    targets: Targets,
    distillation: Distillation,
    train: float | Float[Tensor, ""],
) -> Sums:
    """`objective` from λ_train, which may be a tensor."""
    # 1. CE over all masked positions: Σ w(t)·(−log p_s(gold)).
    logits = at_least_float32(logits)
    ce = denoise(logits, targets.gold, targets.t).sum()
    match distillation:
        case NoDistillation():
            return Sums(ce, torch.zeros((), device=logits.device))
        case KL() | ReverseKL():
            return Sums(ce, token_distillation(logits, targets, distillation, train))
        case Calm() | ReverseCalm():
            return Sums(ce, chunk_distillation(logits, targets, distillation, train))


def token_distillation(
    logits: Float[Tensor, "n vocab"],
    targets: Targets,
    settings: KL | ReverseKL,
    train: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """T² · Σ weight(t) · KL over the positions at which the teacher was read."""
    topk, temperature = targets.topk, settings.temperature
    if topk is None or temperature not in topk.odds:
        raise ValueError(f"the batch has no top-k targets at temperature {temperature}")
    # 1. The rows at which the teacher was read come first.                              (n → read)
    read = topk.ids.shape[0]
    if not read:
        return logits.sum() * 0.0
    logits, t = logits[:read], targets.t[:read]
    if settings.tail != "cache":
        topk = dataclasses.replace(topk, student_shaped=settings.tail == "student")
    # 2. TIDAL: λ and the timestep weight of each position.                                  (read)
    weight, strength = torch.ones_like(t), None
    if settings.tidal is not None:
        strength = tidal.strength_at(settings.tidal, train, t)
        weight = tidal.timestep_weight(settings.tidal.timestep_weight, t)
    # 3. The divergence. T² keeps the gradient's size as T rises.
    reverse = isinstance(settings, ReverseKL)
    divergence = token_divergence(logits, topk, temperature, strength, reverse)
    return temperature**2 * (weight * divergence).sum()


def chunk_distillation(
    logits: Float[Tensor, "n vocab"],
    targets: Targets,
    settings: Calm | ReverseCalm,
    train: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Σ weight(t) · CALM over the active chunks."""
    chunks, temperature = targets.chunks, settings.temperature
    if chunks is None:
        raise ValueError("the batch has no chunk targets")
    # 1. The student: log p_s(c)/T = Σ log p(gold token)/T over the chunk's tokens.        (chunks)
    token_logp = calm.token_log_likelihood(logits, targets.gold)
    count = chunks.teacher_logp.shape[0]
    chunk_logp = calm.chunk_log_likelihood(token_logp, chunks.rows, chunks.chunk_of, count)
    log_student = chunk_logp / temperature
    # 2. The teacher: p_t = exp(log p_t(c)/T), the only side that is bounded.
    target = calm.bound_probability((chunks.teacher_logp.to(token_logp.dtype) / temperature).exp())
    # 3. TIDAL: the target moves from the student to the teacher.
    weight = torch.ones_like(chunks.t)
    if settings.tidal is not None:
        strength = tidal.strength_at(settings.tidal, train, chunks.t)
        target = tidal.tidal_probability(log_student.exp(), target, strength)
        weight = tidal.timestep_weight(settings.tidal.timestep_weight, chunks.t)
    # 4. The binary divergence of each chunk.
    term = calm.calm if isinstance(settings, Calm) else calm.reverse_calm
    return (weight * term(log_student, target)).sum()


def parts_of(
    sums: Sums, counts: Counts, distillation: Distillation
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """CE per maskable token, distillation per read position or active chunk; 0 for a count of 0."""
    ce = sums.denoise / counts.maskable.clamp_min(1)
    match distillation:
        case NoDistillation():
            return ce, torch.zeros_like(ce)
        case KL() | ReverseKL():
            return ce, sums.distillation / counts.read.clamp_min(1)
        case Calm() | ReverseCalm():
            return ce, sums.distillation / counts.chunks.clamp_min(1)


def total(
    sums: Sums, counts: Counts, distillation: Distillation, weight: float
) -> Float[Tensor, ""]:
    """loss = CE + weight · distillation, each divided by its own count."""
    ce, distilled = parts_of(sums, counts, distillation)
    return ce if isinstance(distillation, NoDistillation) else ce + weight * distilled
