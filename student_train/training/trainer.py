"""Stage two: the loop. Hugging Face's Trainer carries it; `BatchDataset` has the batches."""

import json
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed
from transformers.integrations.integration_utils import TensorBoardCallback

from shared.cache.manifest import Manifest
from shared.models.loading import compile_layers
from shared.settings.build import to_plain
from shared.settings.config import TrainConfig
from shared.settings.objectives import KL, ReverseKL
from shared.system.errors import TideError
from shared.system.files import write_bytes
from shared.system.hardware import hardware_line, shut_down_process_group
from shared.system.processes import hold
from shared.text.tokenizers import Tokenizer
from student_train.batches.collate import Batch, TargetReader, counts_of
from student_train.batches.loader import BatchDataset, refuse_error
from student_train.losses.fused_head import LossSettings
from student_train.losses.objective import parts_of
from student_train.losses.tidal import training_strength
from student_train.model.card import write_card
from student_train.model.export import save_student
from student_train.model.student import embedding_rows, load_student
from student_train.training.heldout import HeldOut, masked_nll, prepare_heldout, warn_of_overlap
from student_train.training.preflight import begin_or_go_on, compiles, is_first, on_gpu, preflight
from student_train.training.resumable import ResumableTrainer, training_arguments
from student_train.training.step import Watch, nonfinite_error, train_on_loss

_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit"}
_AHEAD = 16  # batches that a process of the loader has ready
_TENSORBOARD = "tensorboard"


def train_student(config: TrainConfig) -> dict[str, float]:
    """Train (or go on training) a student from a cache; its final metrics.

    Writes `out/model`, which transformers loads as is, and the curve, `out/history.json`.
    """
    with ExitStack() as held:
        trainer, tokenizer = make_trainer(config, held)
        trainer.train_resuming()
        trainer.refuse_nonfinite()
        metrics = {**trainer.evaluate(), "seconds": trainer.seconds_trained}
        state = trainer.accelerator.get_state_dict(trainer.model)  # gathers what FSDP has sharded
        if trainer.is_world_process_zero():
            final = trainer.accelerator.unwrap_model(trainer.model)
            save_student(final, tokenizer, config.out / "model", state)
            write_card(config.out / "model", trainer.config, trainer.manifest, metrics)
            history = {"steps": trainer.state.log_history, "final": metrics}
            content = json.dumps({**history, "machine": hardware_line()}, indent=1) + "\n"
            write_bytes(config.out / "history.json", content.encode())
        shut_down_process_group()
    return metrics


def make_trainer(
    config: TrainConfig, held: ExitStack | None = None
) -> "tuple[StudentTrainer, Tokenizer]":
    """Everything that a run needs, checked; `held` gets the lock of the run's folder.

    TideError where something does not fit, or another process trains there.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    # 1. Machine, settings and cache fit each other.
    config, opened = preflight(config, processes)
    manifest = opened.manifest
    # 2. The student, and its batches: the whole run's, in order.
    set_seed(config.seed)
    model, tokenizer = load_student(config.student, config.cache, manifest)
    k, width = manifest.fingerprint.targets.k, embedding_rows(model)
    if manifest.shared_tokenizer and k > width:
        what = f"the cache keeps {k} logits a position, the student has {width}"
        raise TideError(what, fix="use another student")
    dataset = BatchDataset(opened, config, processes)
    steps = math.ceil(len(dataset) / (config.accumulation * processes))
    lengths = manifest.fingerprint.lengths
    heldout = None
    if config.heldout is not None:
        mask_id = manifest.fingerprint.student.mask_id
        heldout = prepare_heldout(config.heldout, lengths, tokenizer, mask_id, config.heldout_draws)
        warn_of_overlap(heldout, config.cache, manifest, opened.store)
    # 3. The run's folder is ours from here on.
    if is_first():
        if held is not None:
            held.enter_context(hold(config.out / ".lock", f"the run {config.out}"))
        begin_or_go_on(config, manifest, processes, steps)
    # 4. The model's forward becomes the loss, and the loop is made.
    read_targets = TargetReader(manifest, opened.layout)
    if compiles(config):
        compile_layers(model)
    train_on_loss(model, lengths.block, read_targets, compiles(config))
    callbacks = []
    if _TENSORBOARD in config.report_to:  # one folder, the run's own, for all its resumptions
        callbacks.append(TensorBoardCallback())
        callbacks[0].logging_dir = str(config.out / _TENSORBOARD)
    trainer = StudentTrainer(
        config,
        manifest,
        read_targets,
        heldout,
        model=model,
        args=arguments(config, manifest, steps, evaluates=heldout is not None),
        callbacks=callbacks,
        train_dataset=dataset,
        eval_dataset=None if heldout is None else dataset,
        data_collator=itemgetter(0),  # an item of the data set is a whole batch
    )
    return trainer, tokenizer


class StudentTrainer(ResumableTrainer):
    """Trains on whole batches; sums are divided once, by counts over all accumulated batches."""

    def __init__(
        self,
        config: TrainConfig,
        manifest: Manifest,
        read: TargetReader,
        heldout: HeldOut | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.config = config  # with all that was left open decided
        self.manifest = manifest
        self.read_targets = read
        self._heldout = heldout
        self._watch = Watch()
        self._batches_done = 0  # of the step at hand
        # Called before each batch with its number in the run, for `tide replay`.
        self.at_item: Callable[[int, Any, Batch, LossSettings], None] | None = None

    @property
    def progress(self) -> float:
        """τ = step / max_steps."""
        return self.state.global_step / max(self.state.max_steps, 1)

    @property
    def _item(self) -> int:
        """The number in the data set of the batch at hand."""
        done = self.state.global_step * self.config.accumulation + self._batches_done
        return done * self.accelerator.num_processes + self.accelerator.process_index

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of one optimizer step, and the denominators, over those of all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(3, dtype=torch.float64, device=device)
        for batch in batches:
            refuse_error(batch)
            counts += batch["counts"].to(device)
        self._batches_done = 0
        return batches, self.accelerator.reduce(counts, "sum")

    def compute_loss(  # type: ignore[override]
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """This process's share of the step's loss.

        Gradients over processes and accumulated batches add up to those of one large batch: counts
        are global, and DDP's mean over processes is undone.
        """
        config, counts = self.config, counts_of(num_items_in_batch)
        settings = LossSettings(config.distillation, config.weight, counts, self.progress)
        if self.at_item is not None:
            self.at_item(self._item, model, inputs, settings)
        loss, sums = model(batch=inputs, settings=settings)
        with torch.no_grad():
            mass = None
            if isinstance(config.distillation, KL | ReverseKL):
                mass = self.read_targets.mass_in_topk(inputs, config.distillation.temperature)
            parts = parts_of(sums, counts, config.distillation)
            self._watch.add(self._item, loss, parts, inputs, mass)
        self._batches_done += 1
        return loss * self.accelerator.num_processes

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what is watched, and λ. TideError where a loss was not finite."""
        self.refuse_nonfinite()
        logs.pop("train_samples_per_second", None)  # to transformers a whole batch is one sample
        if "loss" in logs:
            logs = {**logs, **self._watch.read(self.accelerator, self.config.accumulation)}
            tidal = getattr(self.config.distillation, "tidal", None)
            if tidal is not None:
                logs["tidal_lambda_train"] = training_strength(tidal, self.progress)
        dataset: Any = self.train_dataset
        done = self.state.global_step * self.config.accumulation * self.accelerator.num_processes
        self.state.epoch = dataset.epochs_in(done)  # to transformers the whole run is one epoch
        super().log(logs, *args, **kwargs)
        if self.is_world_process_zero():
            step, steps = self.state.global_step, self.state.max_steps
            progress = json.dumps({"step": step, "max_steps": steps, **logs})
            write_bytes(self.config.out / "progress.json", (progress + "\n").encode())

    def refuse_nonfinite(self) -> None:
        """TideError, with the batch saved, where a loss since the start was not finite."""
        item = self._watch.bad_item(self.accelerator)
        if item < 0:
            return
        dataset: Any = self.train_dataset
        number = item // self.accelerator.num_processes
        step = number // self.config.accumulation
        raise nonfinite_error(self.config.out, step, number, dataset.rows(item), dataset[item])

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out scores (`masked_nll`), logged as eval_heldout_…; those of a step that is scored
        already (perhaps before an interruption) are not computed again.
        """
        if self._heldout is None:
            return {}
        for entry in self.state.log_history:
            if entry["step"] == self.state.global_step and "eval_heldout_nll" in entry:
                return {k: v for k, v in entry.items() if k.startswith("eval_heldout_")}
        model = self.accelerator.unwrap_model(self.model)
        scores = masked_nll(model, self._heldout, lambda batch: model(batch=batch))
        metrics = {f"eval_heldout_{name}": value for name, value in scores.items()}
        self.log(metrics)
        return metrics


def arguments(config: TrainConfig, manifest: Manifest, steps: int, evaluates: bool) -> Any:
    """TrainingArguments; trackers log the settings as `tide`, with the cache's digest."""
    settings: dict[str, Any] = {"use_cpu": True} if config.device == "cpu" else {}
    workers = int(on_gpu(config)) if config.loader_workers < 0 else config.loader_workers
    if workers:
        # Made many ahead, batches of the next shards are decoded while the last are trained on. Of
        # a process that has CUDA and threads nothing may be forked.
        settings |= {"dataloader_num_workers": workers, "dataloader_prefetch_factor": _AHEAD}
        settings |= {"dataloader_persistent_workers": True}
        settings |= {"dataloader_multiprocessing_context": "spawn"}
    if config.parallel == "fsdp":
        settings |= {"fsdp": True, "fsdp_config": {"version": 2}}
    made = training_arguments(
        config.out / "checkpoints",
        run_name=config.run_name or config.out.name,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=config.accumulation,
        max_steps=steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=math.ceil(config.warmup_ratio * steps),
        lr_scheduler_type=config.schedule,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bfloat16",
        seed=config.seed,
        save_steps=config.checkpoint_steps,
        logging_steps=config.log_steps,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.eval_steps,
        report_to=[name for name in config.report_to if name != _TENSORBOARD],
        ddp_find_unused_parameters=False,
        optim=_OPTIMIZERS.get(config.optimizer, config.optimizer),
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},
        **settings,
    )
    about = {"cache_digest": manifest.digest, "teacher": manifest.fingerprint.teacher.name}
    made.tide = json.loads(json.dumps({**to_plain(config), **about}))
    return made
