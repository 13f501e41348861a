"""Stage two: the loop. Hugging Face's Trainer carries it; the loss is `objective`, the data `BatchDataset`."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from shared.cache.manifest import Manifest
from shared.models.loading import compile_layers
from shared.settings.config import TrainConfig
from shared.settings.objectives import KL, ReverseKL
from shared.system.atomic import disk_is_full, write_bytes
from shared.system.errors import TideError
from shared.system.hardware import hardware_line, shut_down_process_group
from shared.system.locks import hold
from shared.text.tokenizers import Tokenizer
from student_train.batches.collate import Batch, TargetReader, counts_of
from student_train.batches.loader import BatchDataset, refuse_error
from student_train.batches.open_cache import open_cache
from student_train.losses.fused_head import LossSettings
from student_train.losses.objective import parts_of
from student_train.losses.tidal import training_strength
from student_train.model.card import write_card
from student_train.model.export import save_student
from student_train.model.student import embedding_rows, load_student
from student_train.training.arguments import arguments, tensorboard
from student_train.training.heldout import HeldOut, masked_nll, prepare_heldout, warn_of_overlap
from student_train.training.metrics import Watch, stop_at_nonfinite
from student_train.training.preflight import (
    check_draws,
    check_hardware,
    check_objective,
    check_optimizer,
    check_targets,
    check_trackers,
    compiles,
    settle_attention,
    settle_batch,
    settle_precision,
)
from student_train.training.resumable import ResumableTrainer
from student_train.training.run_folder import settle_run_folder
from student_train.training.step import train_on_loss


class StudentTrainer(ResumableTrainer):
    """Trains on whole batches; sums are divided once, by counts over all accumulated batches."""

    def __init__(
        self,
        *args: Any,
        config: TrainConfig,
        block: int,
        heldout: HeldOut | None,
        read_targets: TargetReader,
        manifest: Manifest,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.manifest = manifest
        self._config, self._block, self._heldout, self.read_targets = (
            config,
            block,
            heldout,
            read_targets,
        )
        self._watch, self._batches_done = Watch(), 0
        self.at_item: Callable[[int, Any, Batch, LossSettings], None] | None = None
        """Called before each batch with its number in the run, for `tide replay`."""

    @property
    def config(self) -> TrainConfig:
        """The run's settings, with all that was left open decided."""
        return self._config

    @property
    def block(self) -> int:
        """Block of the student's block diffusion."""
        return self._block

    @property
    def progress(self) -> float:
        """τ = step / max_steps."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of one optimizer step, and the denominators over all of them, on all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            refuse_error(batch)
        counts = torch.zeros(3, dtype=torch.float64, device=device)
        for batch in batches:
            counts += batch["counts"].to(device)
        self._batches_done = 0
        return batches, self.accelerator.reduce(counts, "sum")

    @property
    def _item(self) -> int:
        """The number in the data set of the batch at hand."""
        done = self.state.global_step * self._config.accumulation + self._batches_done
        return done * self.accelerator.num_processes + self.accelerator.process_index

    def compute_loss(  # type: ignore[override]
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """This process's share of the step's loss. Gradients over processes and accumulated batches add up to those
        of one large batch: counts are global, and DDP's mean over processes is undone.
        """
        config, counts = self._config, counts_of(num_items_in_batch)
        settings = LossSettings(config.distillation, config.weight, counts, self.progress)
        if self.at_item is not None:
            self.at_item(self._item, model, inputs, settings)
        loss, sums = model(batch=inputs, settings=settings)
        with torch.no_grad():
            mass = None
            if isinstance(config.distillation, KL | ReverseKL):
                mass = self.read_targets.mass_in_topk(inputs, config.distillation.temperature)
            self._watch.add(
                self._item, loss, parts_of(sums, counts, config.distillation), inputs, mass
            )
        self._batches_done += 1
        return loss * self.accelerator.num_processes

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what is watched and λ to the training logs. TideError where a loss was not finite."""
        self.refuse_nonfinite()
        logs.pop("train_samples_per_second", None)  # to transformers a whole batch is one sample
        if "loss" in logs:
            logs = {**logs, **self._watch.read(self.accelerator, self._config.accumulation)}
            tidal = getattr(self._config.distillation, "tidal", None)
            if tidal is not None:
                logs["tidal_lambda_train"] = training_strength(tidal, self.progress)
        dataset: Any = self.train_dataset
        done = self.state.global_step * self._config.accumulation * self.accelerator.num_processes
        self.state.epoch = dataset.epochs_in(done)  # to transformers the whole run is one epoch
        super().log(logs, *args, **kwargs)
        if not self.is_world_process_zero():
            return
        progress = {"step": self.state.global_step, "max_steps": self.state.max_steps, **logs}
        write_bytes(self._config.out / "progress.json", (json.dumps(progress) + "\n").encode())

    def refuse_nonfinite(self) -> None:
        """TideError, with the batch saved, where a loss since the start was not finite."""
        item = self._watch.bad_item(self.accelerator)
        if item < 0:
            return
        dataset: Any = self.train_dataset
        number = item // self.accelerator.num_processes
        step = number // self._config.accumulation
        raise stop_at_nonfinite(self._config.out, step, number, dataset.rows(item), dataset[item])

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out masked NLL; logged as eval_heldout_nll and eval_heldout_bits_per_byte."""
        if self._heldout is None:
            return {}
        for (
            entry
        ) in self.state.log_history:  # this step is scored already, perhaps before an interruption
            if entry["step"] == self.state.global_step and "eval_heldout_nll" in entry:
                return {k: v for k, v in entry.items() if k.startswith("eval_heldout_")}
        model = self.accelerator.unwrap_model(self.model)
        found = masked_nll(model, self._heldout, lambda batch: model(batch=batch))
        metrics = {f"eval_heldout_{name}": value for name, value in found.items()}
        self.log(metrics)
        return metrics


def make_trainer(
    config: TrainConfig, held: ExitStack | None = None
) -> tuple[StudentTrainer, Tokenizer]:
    """Everything that a run needs, checked; `held` gets the lock of the run's folder. TideError where something does
    not fit, or another process trains there.
    """
    check_trackers(config.report_to)
    check_hardware(config)
    check_optimizer(config)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    config = settle_batch(settle_precision(config), processes)
    opened = open_cache(config)
    manifest = opened.manifest
    check_objective(config.distillation, manifest, config.cache)
    check_draws(config, manifest)
    lengths = manifest.fingerprint.lengths
    set_seed(config.seed)
    model, tokenizer = load_student(settle_attention(config), config.cache, manifest)
    _check_ids(model, manifest)
    dataset = BatchDataset(opened, config, processes)
    check_targets(config.distillation, dataset.totals, config.cache)
    steps = math.ceil(len(dataset) / (config.accumulation * processes))
    heldout = None
    if config.heldout is not None:
        mask_id = manifest.fingerprint.student.mask_id
        heldout = prepare_heldout(config.heldout, lengths, tokenizer, mask_id, config.heldout_draws)
        warn_of_overlap(heldout, config.cache, manifest, opened.store)
    if int(os.environ.get("RANK", "0")) == 0:
        if held is not None:
            held.enter_context(hold(config.out / ".lock", f"the run {config.out}"))
        settle_run_folder(config, manifest, processes, steps)
    read_targets = TargetReader(manifest, opened.layout)
    if compiles(config):
        compile_layers(model)
    train_on_loss(model, lengths.block, read_targets, compiles(config))
    trainer = StudentTrainer(
        model=model,
        args=arguments(config, manifest, steps, heldout is not None),
        callbacks=tensorboard(config),
        train_dataset=dataset,
        eval_dataset=dataset if heldout is not None else None,
        data_collator=_only,
        config=config,
        block=lengths.block,
        heldout=heldout,
        read_targets=read_targets,
        manifest=manifest,
    )
    return trainer, tokenizer


def train_student(config: TrainConfig) -> dict[str, float]:
    """Train (or go on training) a student from a cache; return its final metrics.

    The result is `out/model`, which transformers loads as is, and `out/history.json`, the logged curve.
    """
    with ExitStack() as held, _explained_disk(config.out):
        trainer, tokenizer = make_trainer(config, held)
        trainer.train_resuming()
        trainer.refuse_nonfinite()
        metrics = {**trainer.evaluate(), "seconds": trainer.seconds_trained}
        state = trainer.accelerator.get_state_dict(trainer.model)  # gathers what FSDP has sharded
        if trainer.is_world_process_zero():
            final = trainer.accelerator.unwrap_model(trainer.model)
            save_student(final, tokenizer, config.out / "model", state)
            write_card(config.out / "model", trainer.config, trainer.manifest, metrics)
            history = {
                "steps": trainer.state.log_history,
                "final": metrics,
                "machine": hardware_line(),
            }
            write_bytes(
                config.out / "history.json", (json.dumps(history, indent=1) + "\n").encode()
            )
        shut_down_process_group()
    return metrics


@contextmanager
def _explained_disk(out: Path) -> Iterator[None]:
    """A full disk, or a folder that cannot be written: an OSError, or an error of the library that was writing."""
    try:
        yield
    except TideError:
        raise
    except Exception as error:
        if disk_is_full(error):
            raise TideError(
                f"the disk is full: a file in {out} could not be written",
                fix="free some space and run the same command again; it goes on from the last whole checkpoint",
            ) from error
        if getattr(error, "errno", None) in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise TideError(
                f"{out} cannot be written: {error}", fix="choose another folder (--out)"
            ) from error
        raise


def _only(batches: list[Batch]) -> Batch:
    """The data set's items are whole batches already."""
    return batches[0]


def _check_ids(model: Any, manifest: Manifest) -> None:
    width = embedding_rows(model)
    k = manifest.fingerprint.targets.k
    if manifest.shared_tokenizer and k > width:
        raise TideError(
            f"the cache keeps {k} logits a position, the student has {width}",
            fix="use another student",
        )
