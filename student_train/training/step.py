"""What one forward pass of training computes, as the model's own forward: so DDP and FSDP see all
of it.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn

from student_train.batches.collate import Batch, TargetReader
from student_train.losses.fused_head import LossSettings, fused_loss
from student_train.losses.targets import Targets
from student_train.model.student import batch_hidden


def train_on_loss(
    model: Any,
    block: int,
    read: TargetReader,
    compiled: bool = False,
    rows_per_slice: int | None = None,
) -> None:
    """From now on `model(batch=…, settings=…)` returns the loss and its sums; without settings, the
    logits at the masked positions, [masked, vocab]. `rows_per_slice`: of logits that exist at a
    time (default: by the device).

    DistributedDataParallel and FSDP hook the forwards of modules; a loss computed outside of the
    model's would escape the first, weights read outside of the LM head's the second. The stock
    forwards stay reachable on the classes, and saving and loading do not change.
    """

    def forward(self: Any, batch: Batch, settings: LossSettings | None = None) -> Any:
        hidden = batch_hidden(self, batch, block)  # [masked, width]
        if settings is None:
            return self.lm_head(hidden)
        return self.lm_head(hidden, read(batch), settings)

    def head(
        self: Any,
        hidden: Tensor,
        targets: Targets | None = None,
        settings: LossSettings | None = None,
    ) -> Any:
        if targets is None or settings is None:
            return nn.Linear.forward(self, hidden)
        return fused_loss(hidden, self.weight, targets, settings, rows_per_slice, compiled)

    model.forward = MethodType(forward, model)
    model.lm_head.forward = MethodType(head, model.lm_head)
