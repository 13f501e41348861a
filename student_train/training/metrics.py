"""What is watched while a student trains: parts of the loss, teacher mass, speed; and losses that are not finite.

Everything is summed on the device and read when the trainer logs, so that no step waits for a number.
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
        """Take note of one batch; `item` is its number in the run, `mass` the teacher's per masked position."""
        device = loss.device
        self._sums, self._first_bad = self._sums.to(device), self._first_bad.to(device)
        none = torch.zeros((), device=device)
        counts = batch["counts"].to(device)
        seen = (none, none) if mass is None else (mass.sum(), none + mass.numel())
        values = [
            *parts,
            none + 1,
            none + batch["tokens"],
            none + batch["gold"].numel(),
            counts[2],
            *seen,
        ]
        self._sums += torch.stack([value.detach().double() for value in values])
        news = (self._first_bad < 0) & ~torch.isfinite(loss.detach())
        self._first_bad = torch.where(news, item, self._first_bad)

    def bad_item(self, accelerator: Any) -> int:
        """The first item, on any process, whose loss was not finite; −1 where all were."""
        found = [int(x) for x in accelerator.gather(self._first_bad.reshape(1)).tolist()]
        return min((x for x in found if x >= 0), default=-1)

    def read(self, accelerator: Any, accumulation: int) -> dict[str, float]:
        """Means since the last reading, over all processes; then begins anew."""
        sums: Any = accelerator.reduce(self._sums, "sum")
        got = dict(zip(_NAMES, sums.tolist(), strict=True))
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._sums.zero_()
        steps = max(got["batches"] / (accumulation * accelerator.num_processes), 1)
        logs = {name: got[name] / steps for name in ("denoise", "distillation")}
        logs |= {"masked_positions": got["masked"] / steps, "active_chunks": got["chunks"] / steps}
        if got["mass_rows"]:
            logs["teacher_mass_in_topk"] = got["mass"] / got["mass_rows"]
        logs["tokens_per_second"] = got["tokens"] / max(seconds, 1e-9)
        if torch.cuda.is_available():
            logs["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return logs


def stop_at_nonfinite(
    out: Path, step: int, number: int, rows: list[Any], batch: Batch
) -> TideError:
    """Save the batch whose loss was not finite; the error that stops the run. `number`: of the batch in the run."""
    ids = [row.example_id for row in rows]
    write_bytes(
        out / f"{NONFINITE}.safetensors",
        save({k: v.contiguous() for k, v in batch.items() if isinstance(v, Tensor)}),
    )
    note = {"step": step, "batch": number, "example_ids": ids}
    write_bytes(out / f"{NONFINITE}.json", (json.dumps(note, indent=1) + "\n").encode())
    return TideError(
        f"the loss was not finite at step {step}; examples {', '.join(ids[:8])}{' …' if len(ids) > 8 else ''}",
        expected="a finite loss",
        fix=f"`tide replay {out}` goes to that step again and shows where it breaks; a lower learning_rate or "
        "precision=float32 often helps. Checkpoints before the step are kept",
    )
