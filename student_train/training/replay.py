"""`tide replay RUN`: go to the step whose loss was not finite again, and show where it breaks.

A run is the same float for float when it is repeated, so the last whole checkpoint before the step and the recorded
settings lead to the very weights and batch of that moment.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from shared.settings.build import build
from shared.settings.config import TrainConfig
from shared.system.errors import TideError
from shared.system.files import read_json
from student_train.batches.collate import Batch
from student_train.losses.fused_head import LossSettings
from student_train.losses.objective import objective
from student_train.training.checkpoints import whole_checkpoints
from student_train.training.metrics import NONFINITE
from student_train.training.trainer import make_trainer


class _Reached(Exception):
    """The item is here; carries the report."""


def replay(run: Path) -> str:
    """A report on the recorded step of `run`. TideError where nothing is recorded."""
    try:
        note = read_json(run / f"{NONFINITE}.json")
        settings = read_json(run / "run.json")["config"]
        note = {
            "step": int(note["step"]),
            "batch": int(note["batch"]),
            "example_ids": list(map(str, note["example_ids"])),
        }
        settings = {**settings}
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, TideError):
            raise
        raise TideError(
            f"the record of {run} cannot be read: {error}", fix="copy the run's folder again"
        ) from error
    except OSError as error:
        raise TideError(
            f"{run} has no record of a loss that was not finite ({Path(str(error.filename)).name} is missing)",
            expected="a run that `tide train` stopped for that reason",
        ) from error
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tide-replay-"))
        out = Path(folder) / "run"
        before = [
            c.folder for c in whole_checkpoints(run / "checkpoints") if c.step <= note["step"]
        ]
        if before:
            shutil.copytree(before[-1], out / "checkpoints" / before[-1].name)
        trainer, _ = make_trainer(
            build(TrainConfig, {**settings, "out": out, "report_to": []}), stack
        )

        def at_item(item: int, model: Any, batch: Batch, how: LossSettings) -> None:
            if item == note["batch"]:
                raise _Reached(_describe(trainer, model, batch, how, note))

        trainer.at_item = at_item
        try:
            trainer.train_resuming()
        except _Reached as reached:
            return str(reached)
    raise TideError(
        f"the run of {run} no longer comes to batch {note['batch']}",
        fix="give back the cache as it was",
    )


@torch.no_grad()
def _describe(
    trainer: Any, model: Any, batch: Batch, how: LossSettings, note: dict[str, Any]
) -> str:
    model = trainer.accelerator.unwrap_model(model)
    weights = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    logits = model(batch=batch).float()
    bad_rows = (~torch.isfinite(logits).all(dim=1)).nonzero().squeeze(1).tolist()
    sums = objective(logits, trainer.read_targets(batch), how.distillation, how.progress)
    wrong = {
        k: int((~torch.isfinite(v)).sum())
        for k, v in batch.items()
        if torch.is_tensor(v) and v.is_floating_point()
    }
    return "\n".join(
        [
            f"step {note['step']}, batch {note['batch']}, examples {', '.join(note['example_ids'])}",
            f"weights that are not finite: {', '.join(weights[:5]) or 'none'}",
            f"targets that are not finite: {', '.join(k for k, n in wrong.items() if n) or 'none'}",
            f"rows of logits that are not finite: {len(bad_rows)} of {len(logits)}"
            + (
                f", the first is masked position {bad_rows[0]}"
                if bad_rows
                else f"; largest |logit| {logits.abs().max():.4g}"
            ),
            f"sum of CE {float(sums.denoise):.6g}, sum of distillation {float(sums.distillation):.6g}",
        ]
    )
