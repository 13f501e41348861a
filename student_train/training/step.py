"""What one forward pass of training computes, as the model's own forward: so DDP and FSDP see all of it."""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any, Literal

from torch import Tensor, nn

from student_train.batches.collate import Batch, TargetReader
from student_train.losses.fused_head import LossSettings, fused_loss
from student_train.losses.liger_head import liger_loss
from student_train.losses.objective import Sums
from student_train.losses.targets import Targets
from student_train.model.student import batch_hidden

Way = Literal["sliced", "compiled", "liger"]
"""How head and loss run: in slices, their losses compiled or not, or by Liger's kernel."""


def train_on_loss(
    model: Any,
    block: int,
    read: TargetReader,
    way: Way = "sliced",
    rows_per_slice: int | None = None,
) -> None:
    """From now on `model(batch=…, settings=…)` returns the loss and its sums; without settings, the logits at the
    masked positions. `rows_per_slice`: of logits that exist at a time (default: by the device).

    DistributedDataParallel and FSDP hook the forwards of modules; a loss computed outside of the model's would escape
    the first, weights read outside of the LM head's the second. The stock forwards stay reachable on the classes, and
    saving and loading do not change.
    """
    compute = (
        liger_loss
        if way == "liger"
        else partial(fused_loss, compiled=way == "compiled", rows_per_slice=rows_per_slice)
    )

    def forward(self: Any, batch: Batch, settings: LossSettings | None = None) -> Any:
        hidden = batch_hidden(self, batch, block)
        return (
            self.lm_head(hidden)
            if settings is None
            else self.lm_head(hidden, read(batch), settings)
        )

    def head(
        self: Any,
        hidden: Tensor,
        targets: Targets | None = None,
        settings: LossSettings | None = None,
    ) -> Tensor | tuple[Tensor, Sums]:
        if targets is None or settings is None:
            return nn.Linear.forward(self, hidden)
        return compute(hidden, self.weight, targets, settings)

    model.forward = MethodType(forward, model)
    model.lm_head.forward = MethodType(head, model.lm_head)
