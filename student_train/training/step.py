"""One step: the model's forward becomes the loss, so that DDP and FSDP see all of it; what is
watched of it; and what is written where a loss is not finite.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from shared.system.errors import TideError
from shared.system.files import write_bytes
from student_train.batches.collate import Batch, TargetReader
from student_train.losses.fused_head import LossSettings, fused_loss
from student_train.model.student import batch_hidden

NONFINITE = "nonfinite"
_NAMES = ("denoise", "distillation", "batches", "tokens", "masked", "chunks", "mass", "mass_rows")


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

    def head(self: Any, hidden: Tensor, targets: Any = None, settings: Any = None) -> Any:
        if targets is None or settings is None:
            return nn.Linear.forward(self, hidden)
        return fused_loss(hidden, self.weight, targets, settings, rows_per_slice, compiled)

    model.forward = MethodType(forward, model)
    model.lm_head.forward = MethodType(head, model.lm_head)


class Watch:
    """Sums since the last log, and the first item of the run whose loss was not finite.

    All is summed on the device and read when the trainer logs: no step waits for a number.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(len(_NAMES), dtype=torch.float64)
        self._first_bad = torch.full((), -1, dtype=torch.int64)
        self._since = time.perf_counter()

    def add(
        self, item: int, loss: Tensor, parts: Sequence[Tensor], batch: Batch, mass: Tensor | None
    ) -> None:
        """Take note of batch `item` of the run: `parts` are the means of cross-entropy and
        distillation, `mass` is the teacher's inside of the top-k, [masked].
        """
        self._sums = self._sums.to(loss.device)
        self._first_bad = self._first_bad.to(loss.device)
        none = torch.zeros((), device=loss.device)
        tokens = none + batch["tokens"]
        masked = none + batch["gold"].numel()
        chunks = batch["counts"].to(loss.device)[2]
        seen = (none, none) if mass is None else (mass.sum(), none + mass.numel())
        values = [*parts, none + 1, tokens, masked, chunks, *seen]
        self._sums += torch.stack([value.detach().double() for value in values])
        newly_bad = (self._first_bad < 0) & ~torch.isfinite(loss.detach())
        self._first_bad = torch.where(newly_bad, item, self._first_bad)

    def bad_item(self, accelerator: Any) -> int:
        """The first item, on any process, whose loss was not finite; −1 where all were."""
        firsts = accelerator.gather(self._first_bad.reshape(1)).tolist()
        return min((int(item) for item in firsts if item >= 0), default=-1)

    def read(self, accelerator: Any, accumulation: int) -> dict[str, float]:
        """Means since the last reading, over all processes; then begins anew."""
        sums = dict(zip(_NAMES, accelerator.reduce(self._sums, "sum").tolist(), strict=True))
        self._sums.zero_()
        now = time.perf_counter()
        seconds = now - self._since
        self._since = now
        steps = max(sums["batches"] / (accumulation * accelerator.num_processes), 1)
        logs = {
            "denoise": sums["denoise"] / steps,
            "distillation": sums["distillation"] / steps,
            "masked_positions": sums["masked"] / steps,
            "active_chunks": sums["chunks"] / steps,
        }
        if sums["mass_rows"]:
            logs["teacher_mass_in_topk"] = sums["mass"] / sums["mass_rows"]
        logs["tokens_per_second"] = sums["tokens"] / max(seconds, 1e-9)
        if torch.cuda.is_available():
            logs["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return logs


def nonfinite_error(out: Path, step: int, number: int, rows: list[Any], batch: Batch) -> TideError:
    """The error that stops the run. Batch `number` of it, whose loss was not finite, is saved."""
    ids = [row.example_id for row in rows]
    tensors = {k: v.contiguous() for k, v in batch.items() if isinstance(v, Tensor)}
    write_bytes(out / f"{NONFINITE}.safetensors", save(tensors))
    note = {"step": step, "batch": number, "example_ids": ids}
    write_bytes(out / f"{NONFINITE}.json", (json.dumps(note, indent=1) + "\n").encode())
    some = ", ".join(ids[:8]) + (", …" if len(ids) > 8 else "")
    return TideError(
        f"the loss was not finite at step {step}; examples {some}",
        fix=f"`tide replay {out}` shows where it breaks; a lower learning_rate or "
        "precision=float32 often helps. Checkpoints before the step are kept",
    )
