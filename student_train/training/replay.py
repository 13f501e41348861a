"""`tide replay RUN`: go to the step whose loss was not finite again, and show where it breaks.

A run repeats float for float (on CUDA, to rounding): the last whole checkpoint before the step
leads to its weights.
"""

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from shared.settings.build import build
from shared.settings.config import TrainConfig
from shared.system.files import TideError, read_json
from student_train.batches.collate import Batch
from student_train.losses.objective import LossSettings, objective
from student_train.training.preflight import recorded_run
from student_train.training.resumable import whole_checkpoints
from student_train.training.trainer import NONFINITE, StudentTrainer, make_trainer


class _Reached(Exception):
    """The batch is here; carries the report."""


def replay(run: Path, objective: str | None = None) -> str:
    """A report on the recorded step of `run`. TideError where none is recorded, or damaged.

    `objective`: the run's own, `module:Class`, which may be imported where it is named here.
    """
    # 1. What was recorded when the run stopped.
    path = run / f"{NONFINITE}.json"
    if not path.exists():
        raise TideError(f"no loss of {run} was not finite", expected="a run that stopped for that")
    try:
        note = read_json(path)
        step, number = int(note["step"]), int(note["batch"])
        ids, passes = ", ".join(map(str, note["example_ids"])), dict(note["passes"])
    except (ValueError, KeyError, TypeError) as error:
        what = f"{path} cannot be read: {error}"
        raise TideError(what, fix="copy the run's folder again") from error
    # 2. The same run again in a folder of its own, from the last checkpoint before the step.
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tide-replay-"))
        out = Path(folder) / "run"
        before = [c.folder for c in whole_checkpoints(run / "checkpoints") if c.step <= step]
        if before:
            shutil.copytree(before[-1], out / "checkpoints" / before[-1].name)
        settings = {**recorded_run(run).get("config", {}), **passes, "out": out, "report_to": []}
        imports = objective is not None and settings["distillation"].get("type") == objective
        trainer, _ = make_trainer(build(TrainConfig, settings, imports=imports), stack)

        def at_item(item: int, model: Any, batch: Batch, how: LossSettings) -> None:
            if item == number:
                raise _Reached(_describe(trainer, model, batch, how))

        trainer.at_item = at_item
        try:
            trainer.train_resuming()
        except _Reached as report:
            return f"step {step}, batch {number}, examples {ids}\n{report}"
    what = f"the run of {run} no longer comes to batch {number}"
    raise TideError(what, fix="give back the cache as it was")


@torch.no_grad()
def _describe(trainer: StudentTrainer, model: Any, batch: Batch, how: LossSettings) -> str:
    model = trainer.accelerator.unwrap_model(model)
    weights = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    targets = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    logits = model(batch=batch).float()  # [masked, vocab]
    bad_rows = (~torch.isfinite(logits).all(dim=1)).nonzero().squeeze(1).tolist()
    where = f"; largest |logit| {logits.abs().max():.4g}"
    if bad_rows:
        where = f", the first is masked position {bad_rows[0]}"
    sums = objective(logits, trainer.read_targets(batch), how.distillation, how.progress)
    return (
        f"weights that are not finite: {', '.join(weights[:5]) or 'none'}\n"
        f"targets that are not finite: {', '.join(targets) or 'none'}\n"
        f"rows of logits that are not finite: {len(bad_rows)} of {len(logits)}{where}\n"
        f"sum of CE {float(sums.denoise):.6g}, sum of distillation {float(sums.distillation):.6g}"
    )
