"""Hugging Face's Trainer, made safe against kill -9: only whole checkpoints are resumed from."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, no_type_check

import torch
from accelerate.utils import broadcast_object_list
from torch.utils._pytree import tree_map_only
from transformers import Trainer, TrainingArguments

from student_train.training.checkpoints import clear, mark, rotate, whole_checkpoints

_KEPT = 2


@no_type_check  # its inherited fields are transformers' own, and not all of the types that they state
class RecordedArguments(TrainingArguments):
    """TrainingArguments that tell trackers of `tide` too: the run's own settings, and what it is trained from."""

    tide: Mapping[str, Any] = MappingProxyType({})

    def to_dict(self) -> dict[str, Any]:
        """What trackers log as the run's configuration."""
        return {**super().to_dict(), "tide": dict(self.tide)}


def training_arguments(out: Path, **settings: Any) -> RecordedArguments:
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
    return RecordedArguments(**{**defaults, **settings})


class ResumableTrainer(Trainer):
    """A Trainer that goes on from the last whole checkpoint in its output folder, and keeps two."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._seconds_before, self._started = 0.0, time.monotonic()
        self.model_accepts_loss_kwargs = (
            True  # the losses are divided by global counts, not by the loop
        )
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._later: list[Callable[[], object]] | None = None
        """Within `_save_checkpoint`: what is written while training goes on."""

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
        """Weights and optimizer state are copied to host memory, and written while training goes on; what is sharded
        (FSDP) is written by all processes at once, and waited for. Then one marks it, and deletes old ones.
        """
        self.settle()
        self._later = None if self.is_fsdp_enabled else []
        super()._save_checkpoint(model, trial)
        later, self._later = self._later or [], None
        self.accelerator.wait_for_everyone()
        if not self.is_world_process_zero():
            return
        place, step, seconds = (
            Path(str(self.args.output_dir)),
            self.state.global_step,
            self.seconds_trained,
        )

        def finish() -> None:
            for write in later:
                write()
            mark(place / f"checkpoint-{step}", step, seconds)
            rotate(place, _KEPT)

        self._pending = self._writer.submit(finish)
        if self.is_fsdp_enabled:
            self.settle()

    def settle(self) -> None:
        """Wait for the checkpoint that is being written; what went wrong with it is raised here."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _load_callback_state(self) -> None:
        """Called with a checkpoint's state, which says how often it logged, saved and scored: that may have changed."""
        self.state.compute_steps(self.args, self.state.max_steps)
        super()._load_callback_state()

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        if self._later is None or output_dir is None:
            super()._save(output_dir, state_dict)
            return
        model: Any = self.model
        state = _in_host_memory(model.state_dict() if state_dict is None else state_dict)
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        self._later.append(partial(super()._save, output_dir, state))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._later is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if not self.args.should_save:
            return
        parts: dict[str, Any] = {"optimizer.pt": self.optimizer, "scheduler.pt": self.lr_scheduler}
        for name, part in parts.items():
            self._later.append(
                partial(torch.save, _in_host_memory(part.state_dict()), Path(output_dir) / name)
            )

    def train_resuming(self) -> None:
        """Train to the end, from the last whole checkpoint if there is one. Damaged ones are named and passed over."""
        place = Path(str(self.args.output_dir))
        last: list[Any] = [None]
        if self.args.process_index == 0:
            whole = whole_checkpoints(place)
            clear(place, whole)
            last = [(str(whole[-1].folder), whole[-1].seconds) if whole else None]
            if whole:
                print(_what_resume_does(whole[-1].step, self.args.max_steps), file=sys.stderr)
        if self.args.world_size > 1:
            broadcast_object_list(last)  # on a shared file system all must see the same
        folder, self._seconds_before = last[0] or (None, 0.0)
        self._started = time.monotonic()
        try:
            self.train(resume_from_checkpoint=folder)
        finally:
            self.settle()


def _what_resume_does(step: int, steps: int) -> str:
    if step >= steps:
        return f"this run has ended, at step {step:,}; with more epochs or max_steps it is extended"
    return f"the run goes on from checkpoint-{step}: {steps - step:,} of {steps:,} steps are left"


def _in_host_memory(state: Any) -> Any:
    """The same with copies of its tensors, which training does not change."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)
