"""The LM head and the loss by Liger's fused kernel, on GPUs: for objectives that ask only for log p(gold token).

The kernel returns one loss a row, so CE with its 1/t weights and both CALMs follow from it. Objectives over top-k
logits need more than it returns and run in slices (`fused_head`).
"""

from __future__ import annotations

import importlib.util

import torch
from jaxtyping import Float
from torch import Tensor

from shared.settings.objectives import Calm, Distillation, NoDistillation, ReverseCalm
from student_train.losses.fused_head import LossSettings
from student_train.losses.objective import Sums, gold_objective, total
from student_train.losses.targets import Targets


def liger_installed() -> bool:
    """Whether the `liger` extra is there."""
    return importlib.util.find_spec("liger_kernel") is not None


def liger_fits(distillation: Distillation) -> bool:
    """Whether the objective asks the student only for log p(gold token)."""
    return isinstance(distillation, NoDistillation | Calm | ReverseCalm)


def liger_loss(
    hidden: Float[Tensor, "n width"],
    head: Float[Tensor, "vocab width"],
    targets: Targets,
    settings: LossSettings,
) -> tuple[Float[Tensor, ""], Sums]:
    """`fused_loss` by Liger. Under autocast the products and the gradients that come back are in its dtype; sums are
    kept in float32. log p is logsumexp − logit in float32: within 1e-7 of p = 1 it is less exact than in slices.
    """
    from liger_kernel.ops.fused_linear_cross_entropy import (  # type: ignore[import-not-found]
        LigerFusedLinearCrossEntropyFunction,
    )

    distillation = settings.distillation
    assert isinstance(distillation, NoDistillation | Calm | ReverseCalm)
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    if targets.gold.numel() == 0:  # kernels want at least one row
        token_logp = (hidden @ head[:1].T.to(hidden.dtype)).sum(dim=1)
    else:
        ignore_index, no_smoothing = -100, 0.0
        nll, *_ = LigerFusedLinearCrossEntropyFunction.apply(  # type: ignore[misc]
            hidden.to(dtype), head.to(dtype), targets.gold, None, None, ignore_index, 0.0, no_smoothing, "none", None,
            False, torch.float32,
        )  # fmt: skip
        token_logp = -nll.float()
    sums = gold_objective(token_logp, targets, distillation, settings.progress)
    loss = total(sums, settings.counts, distillation, settings.weight)
    return loss, Sums(sums.denoise.detach(), sums.distillation.detach())
