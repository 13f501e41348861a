"""What is watched while a student trains: parts of the loss, teacher mass, speed; and losses that
are not finite.

Everything is summed on the device and read when the trainer logs, so that no step waits for a
number.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from shared.system.atomic import write_bytes
from shared.system.errors import TideError
from student_train.batches.collate import Batch

NONFINITE = "nonfinite"
_NAMES = ("denoise", "distillation", "batches", "tokens", "masked", "chunks", "mass", "mass_rows")


class Watch:
    """Sums since the last log, and the first item of the run whose loss was not finite."""

    def __init__(self) -> None:
        self._sums = torch.zeros(len(_NAMES), dtype=torch.float64)
        self._first_bad = torch.full((), -1, dtype=torch.int64)
        self._since = time.perf_counter()

    def add(
        self,
        item: int,
        loss: Tensor,
        parts: tuple[Tensor, Tensor],
        batch: Batch,
        mass: Tensor | None,
    ) -> None:
        """Take note of one batch.

        `item` is its number in the run, `parts` the means of cross-entropy and distillation, `mass`
        the teacher's inside of the top-k, [masked].
        """
        self._sums = self._sums.to(loss.device)
        self._first_bad = self._first_bad.to(loss.device)
        none = torch.zeros((), device=loss.device)
        tokens, masked = none + batch["tokens"], none + batch["gold"].numel()
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
        seconds, self._since = now - self._since, now
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


def stop_at_nonfinite(
    out: Path, step: int, number: int, rows: list[Any], batch: Batch
) -> TideError:
    """Save the batch whose loss was not finite; the error that stops the run. `number`: of the
    batch in the run.
    """
    ids = [row.example_id for row in rows]
    tensors = {k: v.contiguous() for k, v in batch.items() if isinstance(v, Tensor)}
    write_bytes(out / f"{NONFINITE}.safetensors", save(tensors))
    note = {"step": step, "batch": number, "example_ids": ids}
    write_bytes(out / f"{NONFINITE}.json", (json.dumps(note, indent=1) + "\n").encode())
    return TideError(
        f"the loss was not finite at step {step}; examples "
        f"{', '.join(ids[:8])}{' …' if len(ids) > 8 else ''}",
        expected="a finite loss",
        fix=f"`tide replay {out}` goes to that step again and shows where it breaks; a lower "
        "learning_rate or "
        "precision=float32 often helps. Checkpoints before the step are kept",
    )
