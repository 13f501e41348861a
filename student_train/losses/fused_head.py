"""The LM head and the loss together, a slice of rows at a time: full-vocabulary logits never exist for a whole batch.

The loss is linear in its sums and its denominators are known beforehand, so each slice's gradient is final as soon
as its logits are there. Forward therefore computes gradients too (three matrix products in all, as without slices,
and no second pass over the head), and backward only scales them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from shared.settings.objectives import Distillation
from student_train.losses.objective import (
    Counts,
    Sums,
    lambda_train,
    objective_at,
    on_device,
    slice_targets,
    total,
)
from student_train.losses.targets import Targets

_LOGITS_PER_SLICE = 1 << 25
"""Numbers in one slice's logits on a CPU: 128 MiB in float32. Measured at 151,936 tokens: slices of 220 rows take two
thirds of the time of 110, in which adding up the head's gradient weighs more; 441 a sixth less, in twice the memory."""
_SHARE_OF_GPU = 0.16
_COPIES = 6
"""Of a slice's logits that a GPU holds at one time (`tide rehearse` counts 5.2): themselves, softmax, targets, their
gradients."""
_MOST_ROWS = 2048
"""The head's gradient, which every slice moves, weighs as much as 1,200 rows of logits."""


def slice_rows(vocabulary: int, memory: int | None = None) -> int:
    """Rows of logits that exist at a time. `memory`: of the GPU in bytes, a sixth of which a slice takes; None: a CPU.

    Each slice adds its part to the head's gradient, which is as large as the head: on a GPU few large slices are
    cheaper, of a thousand rows and more from 24 GB on.
    """
    if memory is None:
        return max(32, _LOGITS_PER_SLICE // vocabulary)
    return max(32, min(_MOST_ROWS, int(_SHARE_OF_GPU * memory) // (4 * _COPIES * vocabulary)))


@dataclass(frozen=True)
class LossSettings:
    """What turns sums into a loss: the objective, its weight, the denominators, τ = step / max_steps."""

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

    Equal to the plain computation in value and in the gradients of `hidden` and `head`, up to the order of float32
    sums. Under autocast the products run in its dtype; logits, losses and the head's gradient stay in float32.
    `compiled`: the loss of a slice in a few kernels.
    """
    size = rows_per_slice or slice_rows(head.shape[0], _memory_of(head.device))
    loss, denoise, distillation = _Fused.apply(hidden, head, targets, settings, size, compiled)  # type: ignore[misc]
    return loss, Sums(denoise, distillation)


def _memory_of(device: torch.device) -> int | None:
    """Bytes of a GPU; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


@cache
def compiled_objective() -> Any:
    """`objective_at` in a few kernels, forward and backward; once for every number of rows."""
    return torch.compile(objective_at, dynamic=True)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Targets,
        settings: LossSettings,
        size: int,
        compiled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        rows, weights = hidden.to(dtype), head.to(dtype)
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        grad_head = torch.zeros_like(head, dtype=exact) if wants_head else None
        sums = torch.zeros(3, dtype=exact, device=hidden.device)
        measure = compiled_objective() if compiled else objective_at
        train = sums.new_full((), lambda_train(settings.distillation, settings.progress))
        with torch.autocast(kind, enabled=False):
            for part, own in slice_targets(targets, size):
                logits = (
                    (rows[part] @ weights.T).to(exact).requires_grad_(wants_hidden or wants_head)
                )
                with torch.enable_grad():
                    found = measure(logits, on_device(own), settings.distillation, train)
                    loss = total(found, settings.counts, settings.distillation, settings.weight)
                sums += torch.stack(
                    [loss.detach(), found.denoise.detach(), found.distillation.detach()]
                )
                if not logits.requires_grad:
                    continue
                (gradient,) = torch.autograd.grad(loss, logits)
                gradient = gradient.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = (gradient @ weights).to(hidden.dtype)
                if grad_head is not None:
                    _add_product(grad_head, gradient, rows[part])
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        loss_, denoise, distillation = (value.clone() for value in sums)
        ctx.mark_non_differentiable(denoise, distillation)
        return loss_, denoise, distillation

    @staticmethod
    def backward(
        ctx: Any, *gradients: Any
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = gradients[0]
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_head is None else grad_head * scale.to(grad_head.dtype),
            None,
            None,
            None,
            None,
        )


def _add_product(total_: Tensor, gradient: Tensor, rows: Tensor) -> None:
    """total += gradient.T @ rows, without a second tensor of that size where the dtypes allow it."""
    if total_.dtype == gradient.dtype:
        total_.addmm_(gradient.T, rows)
    else:
        total_ += gradient.T @ rows
