"""Hugging Face's Trainer, made safe against kill -9: only whole checkpoints are resumed from.

A checkpoint is a folder of several files, so a process killed while writing one leaves a broken folder with the
highest number. Each finished folder therefore gets a marker, written last; folders without it are removed.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from shared.atomic import write_bytes

_MARKER = "COMPLETE"


def training_arguments(out: Path, **settings: Any) -> TrainingArguments:
    """TrainingArguments with this project's defaults: quiet, local, two checkpoints kept, safetensors."""
    defaults: dict[str, Any] = {
        "output_dir": str(out),
        "report_to": [],
        "save_strategy": "steps",
        "save_total_limit": 2,
        "dataloader_num_workers": 0,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "logging_first_step": True,
        "use_cpu": not torch.accelerator.is_available(),
    }
    return TrainingArguments(**{**defaults, **settings})


def complete_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in `folder`, oldest first."""
    found = [p.parent for p in folder.glob(f"checkpoint-*/{_MARKER}")]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


class _Bookkeeping(TrainerCallback):
    """Marks finished checkpoints, and carries the training time over interruptions."""

    def __init__(self) -> None:
        self.seconds_before = 0.0
        self.started = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and args.output_dir is not None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            for file in folder.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            write_bytes(folder / _MARKER, f"{self.seconds:.3f}\n".encode())


class ResumableTrainer(Trainer):
    """A Trainer that goes on from the last finished checkpoint in its output folder."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bookkeeping = _Bookkeeping()
        self.add_callback(self._bookkeeping)
        self.model_accepts_loss_kwargs = True  # the losses are divided by global counts, not by the loop

    @property
    def seconds_trained(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self._bookkeeping.seconds

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        """In order: the data set itself is the shuffled plan of the whole run."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        assert dataset is not None
        return torch.utils.data.SequentialSampler(dataset)  # type: ignore[arg-type]

    def train_resuming(self) -> None:
        """Train to the end, from the last finished checkpoint if there is one."""
        folder = Path(str(self.args.output_dir))
        finished = complete_checkpoints(folder)
        if self.args.process_index == 0:
            for broken in set(folder.glob("checkpoint-*")) - set(finished):
                shutil.rmtree(broken)
        if finished:
            self._bookkeeping.seconds_before = float((finished[-1] / _MARKER).read_text())
        self._bookkeeping.started = time.monotonic()
        self.train(resume_from_checkpoint=str(finished[-1]) if finished else None)
