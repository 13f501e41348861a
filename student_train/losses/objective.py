"""loss = CE + weight · distillation, from logits at masked positions and cached targets.

Everything is a sum over the batch beside its own count. The caller adds sums and counts over
accumulated batches and processes and divides once, so the gradient is that of one large batch.

`fused_loss` is the LM head and the loss together, a slice of rows at a time: no logits of a whole
batch. The loss is linear in its sums and its denominators are known beforehand, so each slice's
gradient is final as soon as its logits are there: forward computes gradients too (three matrix
products in all, as without slices), and backward scales them.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from shared.models.loading import COMPILE
from shared.settings.config import Distillation, Gold, Taught
from student_train.losses import divergence
from student_train.losses.targets import (
    MappedTargets,
    Targets,
    TopKTargets,
    in_student_tokens,
    slice_targets,
)

# Numbers in one slice's logits on a CPU: 128 MiB in float32. Measured at a vocabulary of 151,936:
# slices of 220 rows take two thirds of the time of 110, which add to the head's gradient twice as
# often; slices of 441 rows take a sixth less, in twice the memory.
_LOGITS_PER_SLICE = 1 << 25
# On a GPU a slice takes 0.16 of the memory. Of its logits 6 copies exist at a time (measured: 5.2):
# themselves, softmax, targets, their gradients. Above 2,048 rows nothing is won: moving the head's
# gradient, once a slice, weighs as much as 1,200 rows of logits.
_SHARE_OF_GPU, _COPIES, _MOST_ROWS = 0.16, 6, 2048


@dataclass(frozen=True)
class Counts:
    """The denominators: of CE, of objectives over tokens, of objectives over chunks."""

    maskable: Float[Tensor, ""]
    read: Float[Tensor, ""]  # masked positions at which the teacher was read
    chunks: Float[Tensor, ""]  # active ones


@dataclass(frozen=True)
class LossSettings:
    """What turns sums into a loss: the objective, its weight, the denominators, τ."""

    distillation: Distillation
    weight: float
    counts: Counts
    progress: float


@dataclass(frozen=True)
class Sums:
    """Sums over the batch before any division: weighted cross-entropy, distillation."""

    denoise: Float[Tensor, ""]
    distillation: Float[Tensor, ""]


def denoise(
    logits: Float[Tensor, "n vocab"], gold: Int[Tensor, " n"], t: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """The denoising loss of masked diffusion, w(t)·(−log p(gold)) in nats, with w(t) = 1/t."""
    return F.cross_entropy(divergence.at_least_float32(logits), gold, reduction="none") / t


def objective(
    logits: Float[Tensor, "n vocab"], targets: Targets, distillation: Distillation, progress: float
) -> Sums:
    """The two sums for student `logits`, a row per masked position. `progress` is τ. ValueError
    where the batch lacks what the objective needs.
    """
    targets = for_objective(targets, distillation, divergence.at_least_float32(logits).dtype)
    return objective_at(logits, targets, distillation, lambda_train(distillation, progress))


def for_objective(targets: Targets, distillation: Distillation, dtype: torch.dtype) -> Targets:
    """What `objective_at` reads. Another tokenizer's tokens are mapped outside of it, since sparse
    products do not compile.
    """
    if isinstance(distillation, Taught) and distillation.needs == "topk":
        return in_student_tokens(targets, distillation.temperature, dtype)
    return targets


def lambda_train(distillation: Distillation, progress: float) -> float:
    """TIDAL's λ_train at τ; 0 for objectives without it."""
    settings = getattr(distillation, "tidal", None)
    return 0.0 if settings is None else divergence.training_strength(settings, progress)


def objective_at(
    logits: Float[Tensor, "n vocab"],
    targets: Targets,
    distillation: Distillation,
    train: float | Float[Tensor, ""],
) -> Sums:
    """`objective` from λ_train, which may be a tensor."""
    # 1. CE over all masked positions: Σ w(t)·(−log p_s(gold)).
    logits = divergence.at_least_float32(logits)
    ce = denoise(logits, targets.gold, targets.t).sum()
    # 2. Distillation, over positions or over chunks.
    if isinstance(distillation, Taught):
        of = token_distillation if distillation.needs == "topk" else chunk_distillation
        return Sums(ce, of(logits, targets, distillation, train))
    if isinstance(distillation, Gold):
        topk = targets.topk
        where = slice(len(topk.ids) if isinstance(topk, TopKTargets) else None)
        return Sums(ce, F.cross_entropy(logits[where], targets.gold[where], reduction="sum"))
    return Sums(ce, torch.zeros((), device=logits.device))


def token_distillation(
    logits: Float[Tensor, "n vocab"],
    targets: Targets,
    settings: Taught,
    train: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """T² · Σ weight(t) · D, such as KL, over the positions at which the teacher was read.

    Of a teacher with a tokenizer of its own, the gold tokens stand for it where no chunk covers
    what is masked (the end of a turn, the fill): else the teacher's pull would be paid there.
    """
    topk, temperature = targets.topk, settings.temperature
    mapped = isinstance(topk, MappedTargets)
    # (The look-up makes T a constant of a compiled loss.)
    if topk is None or not (mapped or temperature in topk.level or 1.0 in topk.level):
        raise ValueError(f"the batch has no top-k targets at temperature {temperature} or 1")
    # 1. TIDAL: λ and the timestep weight of each position.                                     (n)
    t = targets.t
    weight, strength = torch.ones_like(t), None
    if settings.tidal is not None:
        strength = divergence.strength_at(settings.tidal, train, t)
        weight = divergence.timestep_weight(settings.tidal.timestep_weight, t)
    # 2. The divergence at the rows that were read, which come first. T² keeps the gradient's size
    # as T rises.
    read, parts = len(topk.mass if mapped else topk.ids), []
    if read:
        own = None if strength is None else strength[:read]
        values = divergence.token_divergence(logits[:read], topk, settings, own)
        parts.append(temperature**2 * (weight[:read] * values).sum())
    # 3. The others: KL(r ‖ p_s) of r = (1 − λ)·p_s + λ·gold, of which λ·CE has the gradient.
    if mapped and read < len(t):
        gold = F.cross_entropy(logits[read:], targets.gold[read:], reduction="none")
        pull = weight if strength is None else weight * strength
        parts.append((pull[read:] * gold).sum())
    return torch.stack(parts).sum() if parts else logits.sum() * 0.0


def chunk_distillation(
    logits: Float[Tensor, "n vocab"],
    targets: Targets,
    settings: Taught,
    train: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Σ weight(t) · D, such as CALM, over the active chunks."""
    chunks, temperature = targets.chunks, settings.temperature
    if chunks is None:
        raise ValueError("the batch has no chunk targets")
    # 1. The student: log p_s(c)/T = Σ log p(gold token)/T over the chunk's tokens.        (chunks)
    token_logp = divergence.token_log_likelihood(logits, targets.gold)
    count = chunks.teacher_logp.shape[0]
    chunk_logp = divergence.chunk_log_likelihood(token_logp, chunks.rows, chunks.chunk_of, count)
    log_student = chunk_logp / temperature
    # 2. The teacher: p_t = exp(log p_t(c)/T), the only side that is bounded.
    log_teacher = chunks.teacher_logp.to(token_logp.dtype) / temperature
    target = divergence.bound_probability(log_teacher.exp())
    # 3. TIDAL: the target moves from the student to the teacher.
    weight = torch.ones_like(chunks.t)
    if settings.tidal is not None:
        strength = divergence.strength_at(settings.tidal, train, chunks.t)
        target = divergence.tidal_probability(log_student.exp(), target, strength)
        weight = divergence.timestep_weight(settings.tidal.timestep_weight, chunks.t)
    # 4. The binary divergence of each chunk.
    ours = {"calm": divergence.calm, "reverse_calm": divergence.reverse_calm}
    term = ours.get(settings.type, partial(divergence.own_values, settings))
    return (weight * term(log_student, target)).sum()


def parts_of(
    sums: Sums, counts: Counts, distillation: Distillation
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """CE per maskable token, distillation per read position or active chunk; 0 for a count of 0."""
    ce = sums.denoise / counts.maskable.clamp_min(1)
    count = counts.chunks if distillation.needs == "chunks" else counts.read
    return ce, sums.distillation / count.clamp_min(1)


def total(
    sums: Sums, counts: Counts, distillation: Distillation, weight: float
) -> Float[Tensor, ""]:
    """loss = CE + weight · distillation, each divided by its own count."""
    ce, distilled = parts_of(sums, counts, distillation)
    return ce + weight * distilled


def fused_loss(
    hidden: Float[Tensor, "n width"],
    head: Float[Tensor, "vocab width"],
    targets: Targets,
    settings: LossSettings,
    rows_per_slice: int | None = None,
    compiled: bool = False,
) -> tuple[Float[Tensor, ""], Sums]:
    """The loss of `objective` and `total` on `hidden @ head.T`, and its (detached) sums.

    Equal to the plain computation in value and in the gradients of `hidden` and `head`, up to the
    order of float32 sums. Under autocast the products run in its dtype; logits, losses and the
    head's gradient stay in float32. `compiled`: the loss of a slice runs in a few kernels.
    """
    if rows_per_slice is None:
        gpu = head.device.type == "cuda"
        memory = torch.cuda.get_device_properties(head.device).total_memory if gpu else None
        rows_per_slice = slice_rows(head.shape[0], memory)
    arguments = (hidden, head, targets, settings, rows_per_slice, compiled)
    loss, ce, distillation = _Fused.apply(*arguments)  # type: ignore
    return loss, Sums(ce, distillation)


# In a few kernels, forward and backward; made once for any number of rows.
_compiled_objective: Any = cache(partial(torch.compile, objective_at, **COMPILE))


def product(a: Tensor, b: Tensor, exact: torch.dtype) -> Tensor:
    """a · b in `exact`; on CUDA it is never rounded to the dtype of its factors."""
    if a.is_cuda and a.dtype != exact:
        return torch.mm(a, b, out_dtype=exact)
    return (a @ b).to(exact)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, *how: Any) -> tuple[Tensor, Tensor, Tensor]:
        targets, settings, rows_per_slice, compiled = how
        # 1. Products run in autocast's dtype, all sums in float32 at least.
        kind, distillation = hidden.device.type, settings.distillation
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else hidden.dtype
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows, weights = hidden.to(dtype), head.to(dtype)
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_head = torch.zeros_like(head, dtype=exact) if wants_head else None
        sums = torch.zeros(3, dtype=exact, device=hidden.device)
        measure = _compiled_objective() if compiled else objective_at
        train = sums.new_full((), lambda_train(distillation, settings.progress))
        with torch.autocast(kind, enabled=False):
            for part, cached in slice_targets(targets, rows_per_slice):
                # 2. Logits of the slice and its share of the loss.                  (slice, vocab)
                own = for_objective(cached, distillation, exact)
                logits = product(rows[part], weights.T, exact)
                logits.requires_grad_(wants_hidden or wants_head)
                if compiled:  # a vocabulary that might vary would not be read in vectors
                    torch._dynamo.mark_static(logits, 1)
                with torch.enable_grad():
                    both = measure(logits, own, distillation, train)
                    loss = total(both, settings.counts, distillation, settings.weight)
                sums += torch.stack([loss, both.denoise, both.distillation]).detach()
                if not logits.requires_grad:
                    continue
                # 3. G = ∂loss/∂logits, then ∂loss/∂hidden = G · head, ∂loss/∂head += Gᵀ · hidden.
                (gradient,) = torch.autograd.grad(loss, logits)
                gradient = gradient.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = (gradient @ weights).to(hidden.dtype)
                if grad_head is not None and grad_head.dtype == dtype:
                    grad_head.addmm_(gradient.T, rows[part])  # without a second one of that size
                elif grad_head is not None:
                    grad_head += product(gradient.T, rows[part], exact)
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        whole, ce, distilled = (value.clone() for value in sums)
        ctx.mark_non_differentiable(ce, distilled)
        return whole, ce, distilled

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        scaled = [x if x is None else x * gradients[0].to(x.dtype) for x in ctx.saved_tensors]
        return *scaled, None, None, None, None


def slice_rows(vocabulary: int, memory: int | None = None) -> int:
    """Rows of logits that exist at a time. `memory`: bytes of the GPU; None for a CPU."""
    if memory is None:
        return max(32, _LOGITS_PER_SLICE // vocabulary)
    return max(32, min(_MOST_ROWS, int(_SHARE_OF_GPU * memory) // (4 * _COPIES * vocabulary)))
