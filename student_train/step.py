"""What one forward pass of training computes, as the model's own forward: so DDP sees all of it."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

from torch import Tensor

from student_train.collate import targets_of
from student_train.fused_head import LossSettings, fused_loss
from student_train.objective import Sums
from student_train.student import masked_hidden


def train_on_loss(model: Any, block: int, temperatures: Sequence[float]) -> None:
    """From now on `model(batch=…, settings=…)` returns the loss and its sums.

    Wrappers such as DistributedDataParallel hook a module's forward; a loss computed outside of it would escape
    them. The stock forward stays reachable on the class, and saving and loading do not change.
    """

    def forward(self: Any, batch: dict[str, Tensor], settings: LossSettings) -> tuple[Tensor, Sums]:
        keys = ("noised", "clean", "valid", "row", "column")
        hidden = masked_hidden(self, *(batch[key] for key in keys), block=block)
        return fused_loss(hidden, self.lm_head.weight, targets_of(batch, temperatures), settings)

    model.forward = MethodType(forward, model)
