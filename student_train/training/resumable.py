"""Hugging Face's Trainer, made safe against kill -9: only whole checkpoints are resumed from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainingArguments

from student_train.training.checkpoints import clear, mark, rotate, whole_checkpoints

_KEPT = 2


def training_arguments(out: Path, **settings: Any) -> TrainingArguments:
    """TrainingArguments with this project's defaults: quiet, local, safetensors."""
    defaults: dict[str, Any] = {
        "output_dir": str(out),
        "report_to": [],
        "save_strategy": "steps",
        "save_total_limit": None,  # transformers goes by dates, which a clock that steps back turns round
        "dataloader_num_workers": 0,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "logging_first_step": True,
        "use_cpu": not torch.accelerator.is_available(),
    }
    return TrainingArguments(**{**defaults, **settings})


class ResumableTrainer(Trainer):
    """A Trainer that goes on from the last whole checkpoint in its output folder, and keeps two."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._seconds_before, self._started = 0.0, time.monotonic()
        self.model_accepts_loss_kwargs = True  # the losses are divided by global counts, not by the loop

    @property
    def seconds_trained(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self._seconds_before + time.monotonic() - self._started

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        """In order: the data set itself is the shuffled plan of the whole run."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        assert dataset is not None
        return torch.utils.data.SequentialSampler(dataset)  # type: ignore[arg-type]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Written by all processes; then marked by one, and old ones deleted."""
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            place, step = Path(str(self.args.output_dir)), self.state.global_step
            mark(place / f"checkpoint-{step}", step, self.seconds_trained)
            rotate(place, _KEPT)

    def train_resuming(self) -> None:
        """Train to the end, from the last whole checkpoint if there is one. Damaged ones are named and passed over."""
        place = Path(str(self.args.output_dir))
        last: list[Any] = [None]
        if self.args.process_index == 0:
            whole = whole_checkpoints(place)
            clear(place, whole)
            last = [(str(whole[-1].folder), whole[-1].seconds) if whole else None]
        if self.args.world_size > 1:
            broadcast_object_list(last)  # on a shared file system all must see the same
        folder, self._seconds_before = last[0] or (None, 0.0)
        self._started = time.monotonic()
        self.train(resume_from_checkpoint=folder)
