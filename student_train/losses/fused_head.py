"""The LM head and the loss together, a slice of rows at a time: no logits of a whole batch.

The loss is linear in its sums and its denominators are known beforehand, so each slice's gradient
is final as soon as its logits are there. Forward therefore computes gradients too (three matrix
products in all, as without slices, and no second pass over the head), and backward scales them.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from shared.settings.objectives import Distillation
from student_train.losses.objective import Counts, Sums, lambda_train, objective_at, total
from student_train.losses.targets import Targets, slice_targets

# Numbers in one slice's logits on a CPU: 128 MiB in float32. Measured at a vocabulary of 151,936:
# slices of 220 rows take two thirds of the time of 110, which add to the head's gradient twice as
# often; slices of 441 rows take a sixth less, in twice the memory.
_LOGITS_PER_SLICE = 1 << 25
# On a GPU a slice takes 0.16 of the memory. Of its logits 6 copies exist at a time (measured: 5.2):
# themselves, softmax, targets, their gradients. Above 2,048 rows nothing is won: moving the head's
# gradient, once a slice, weighs as much as 1,200 rows of logits.
_SHARE_OF_GPU, _COPIES, _MOST_ROWS = 0.16, 6, 2048


def slice_rows(vocabulary: int, memory: int | None = None) -> int:
    """Rows of logits that exist at a time. `memory`: bytes of the GPU; None for a CPU."""
    if memory is None:
        return max(32, _LOGITS_PER_SLICE // vocabulary)
    return max(32, min(_MOST_ROWS, int(_SHARE_OF_GPU * memory) // (4 * _COPIES * vocabulary)))


@dataclass(frozen=True)
class LossSettings:
    """What turns sums into a loss: the objective, its weight, the denominators, τ."""

    distillation: Distillation
    weight: float
    counts: Counts
    progress: float


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


@cache
def compiled_objective() -> Any:
    """`objective_at` in a few kernels, forward and backward; made once for any number of rows."""
    return torch.compile(objective_at, dynamic=True)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Targets,
        settings: LossSettings,
        rows_per_slice: int,
        compiled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
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
        measure = compiled_objective() if compiled else objective_at
        train = sums.new_full((), lambda_train(distillation, settings.progress))
        with torch.autocast(kind, enabled=False):
            for part, own in slice_targets(targets, rows_per_slice):
                # 2. Logits of the slice and its share of the loss.                  (slice, vocab)
                logits = (rows[part] @ weights.T).to(exact)
                logits.requires_grad_(wants_hidden or wants_head)
                with torch.enable_grad():
                    found = measure(logits, own, distillation, train)
                    loss = total(found, settings.counts, distillation, settings.weight)
                sums += torch.stack([loss, found.denoise, found.distillation]).detach()
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
                    grad_head += gradient.T @ rows[part]
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        whole, ce, distilled = (value.clone() for value in sums)
        ctx.mark_non_differentiable(ce, distilled)
        return whole, ce, distilled

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        scaled = [
            None if gradient is None else gradient * gradients[0].to(gradient.dtype)
            for gradient in ctx.saved_tensors
        ]
        return (*scaled, None, None, None, None)
