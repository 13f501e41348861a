"""Stage two: the loop. Hugging Face's Trainer carries it; `BatchDataset` has the batches."""

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from operator import itemgetter
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from safetensors.torch import save
from transformers import set_seed

from shared.cache.manifest import Manifest, checksum_of
from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import compile_layers
from shared.settings.config import TrainConfig
from shared.system.files import TideError, write_bytes
from shared.system.hardware import hardware_line, shut_down_process_group
from shared.system.processes import hold
from shared.text.tokenizers import Tokenizer
from student_train.batches.collate import Batch, TargetReader, counts_of, padding_of
from student_train.batches.loader import BatchDataset
from student_train.export import save_student, write_card
from student_train.losses.objective import LossSettings, lambda_train, parts_of
from student_train.model import load_student, train_on_loss, with_adapter
from student_train.training.heldout import HeldOut, masked_nll, prepare_heldout, warn_of_overlap
from student_train.training.preflight import begin_or_go_on, halved, on_gpu, preflight
from student_train.training.resumable import ResumableTrainer, training_arguments

logger = logging.getLogger(__name__)

NONFINITE = "nonfinite"
_SUMS = ("loss", "denoise", "distillation", "batches", "tokens", "masked", "chunks", "mass",
         "mass_rows")  # fmt: skip


def train_student(
    config: TrainConfig, callbacks: Sequence[Any] = (), halvings: int = 0
) -> dict[str, float]:
    """Train (or go on training) a student from a cache; its final metrics.

    `callbacks`: transformers', which are told of every step. `halvings`: of the passes, from the
    start (`halved`); one more, where memory runs out, and the run goes on from its last step, in
    several processes when it is started again.

    Writes `out/model`, which transformers loads as is, and the curve, `out/history.json`.
    """
    note = config.out / "halved"  # a line for each time that it ended several processes
    if note.exists():
        halvings = max(halvings, note.read_bytes().count(b"\n"))
    while True:
        clear_device_cache(garbage_collection=True)
        with ExitStack() as held:
            trainer, tokenizer = make_trainer(config, held, halvings)
            for callback in callbacks:
                trainer.add_callback(callback)
            if not trainer.train_resuming(smaller=halved(trainer.config, 1) is not None):
                halvings += 1
                if trainer.args.world_size > 1:  # the others wait for this one's gradient
                    write_bytes(note, b"passes half as large\n" * halvings)
                    what = f"memory ran out in process {trainer.args.process_index}"
                    raise TideError(what, fix="start the run again: its passes are half as large")
                del trainer
                continue
            trainer.refuse_nonfinite()
            metrics = {**trainer.evaluate(), "seconds": trainer.seconds_trained}
            state = trainer.accelerator.get_state_dict(trainer.model)  # what FSDP has sharded too
            if trainer.is_world_process_zero():
                final = trainer.accelerator.unwrap_model(trainer.model)
                if config.student.lora is not None:
                    final, state = final.merge_and_unload(), None
                save_student(final, tokenizer, config.out / "model", state)
                write_card(config.out / "model", trainer.config, trainer.manifest, metrics)
                history = {"steps": trainer.state.log_history, "final": metrics}
                content = json.dumps({**history, "machine": hardware_line()}, indent=1) + "\n"
                write_bytes(config.out / "history.json", content.encode())
            shut_down_process_group()
            return metrics


def make_trainer(
    config: TrainConfig, held: ExitStack | None = None, halvings: int = 0
) -> "tuple[StudentTrainer, Tokenizer]":
    """Everything that a run needs, checked; `held` gets the lock of the run's folder. `halvings`:
    how often its passes are `halved`, which changes nothing of what is trained, nor is recorded.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    # 1. Machine, settings and cache fit each other.
    asked, opened = preflight(config, processes)
    config, manifest = asked, opened.manifest
    for _ in range(halvings):
        config = halved(config, processes) or config
    if halvings:
        said = f"{config.batch_size} rows a pass, checkpointing {config.gradient_checkpointing}"
        warnings.warn(f"to fit into memory: {said}; the gradient is the same", stacklevel=2)
    # 2. The student, and its batches: the whole run's, in order.
    set_seed(config.seed)
    model, tokenizer = load_student(config.student, config.cache, manifest)
    k, width = manifest.fingerprint.targets.k, model.config.vocab_size
    if manifest.shared_tokenizer and k > width:
        what = f"the cache keeps {k} logits a position, the student has {width}"
        raise TideError(what, fix="use another student")
    lengths = manifest.fingerprint.lengths
    if lengths.student > (known := model.config.max_position_embeddings):
        what = f"rows of the cache may have {lengths.student} tokens, the student knows {known}"
        raise TideError(f"{what} positions", fix="use another student, or lower lengths.student")
    dataset = BatchDataset(opened, config, processes)
    steps = math.ceil(len(dataset) / (config.accumulation * processes))
    heldout = None
    if config.heldout is not None:
        mask_id = manifest.fingerprint.student.mask_id
        heldout = prepare_heldout(config.heldout, lengths, tokenizer, mask_id, config.heldout_draws)
        warn_of_overlap(heldout, config.cache, manifest, opened.store)
    # 3. The run's folder is ours from here on.
    if os.environ.get("RANK", "0") == "0":
        if held is not None:
            held.enter_context(hold(config.out / ".lock", f"the run {config.out}"))
        base = config.student.checkpoint
        weights = None if base is None else open_checkpoint(resolve(base)).fingerprint()
        content = heldout and checksum_of({"ids": heldout.ids})
        run = {"cache": manifest.digest, "draws": manifest.draws, "steps": steps}
        run["contents"] = {"heldout": content, "student": weights}
        begin_or_go_on(asked, processes, run)
    # 4. The model's forward becomes the loss, and the loop is made.
    read_targets = TargetReader(opened.layout, model.config.vocab_size)
    trained = with_adapter(model, config.student.lora)
    compiled = config.compile == "on" or (config.compile == "auto" and on_gpu(config))
    if compiled:
        compile_layers(model)
    train_on_loss(model, lengths.block, read_targets, compiled)
    how: dict[str, Any] = {"args": training_arguments(config, manifest, steps)}
    how |= {"train_dataset": dataset, "eval_dataset": None if heldout is None else dataset}
    how |= {"model": trained, "data_collator": itemgetter(0)}  # an item is a whole batch
    return StudentTrainer(config, manifest, read_targets, heldout, **how), tokenizer


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
        self.heldout = heldout
        self._began_steps = False
        self._batches_done = 0  # of the step at hand
        # Sums since the last log (`_SUMS`), and the first item whose loss was not finite, −1 for
        # none. They stay on the device until the trainer logs: no step waits for a number.
        device = self.accelerator.device
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self._first_bad = torch.full((), -1, device=device)
        self._since = time.perf_counter()
        # Called before each batch with its number in the run, for `tide replay`.
        self.at_item: Callable[[int, Any, Batch, LossSettings], None] | None = None

    @property
    def progress(self) -> float:
        """τ = step / max_steps."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of one optimizer step, and the denominators, over those of all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.zeros(4, dtype=torch.float64, device=device)
        for batch in batches:
            if "error" in batch:  # of a process of the loader (`BatchDataset.__getitem__`)
                raise TideError(batch["error"])
            counts[:3] += batch["counts"].to(device)
        counts[3] = len(self.asked)
        self._batches_done = 0
        if not self._began_steps and self.is_world_process_zero():
            shares = padding_of(batches)
            said = "padding: %.1f %% of the first step; %.1f %% if no two examples shared a row"
            logger.info(said, *(100 * share for share in shares))
        self._began_steps = True
        counts = self.accelerator.reduce(counts, "sum")
        # Which of several had a signal: known before the step's own work, for which nobody waits.
        self.told = self.asked if self.accelerator.num_processes == 1 else counts[3]
        return batches, counts[:3]

    def compute_loss(  # type: ignore[override]
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """This process's share of the step's loss. Gradients over processes and accumulated batches
        add up to those of one batch: counts are global, and DDP's mean over processes is undone.
        """
        config, counts = self.config, counts_of(num_items_in_batch)
        settings = LossSettings(config.distillation, config.weight, counts, self.progress)
        # 1. The number in the data set of the batch at hand.
        done = self.state.global_step * config.accumulation + self._batches_done
        item = done * self.accelerator.num_processes + self.accelerator.process_index
        if self.at_item is not None:
            self.at_item(item, model, inputs, settings)
        # 2. The loss.
        loss, sums = model(batch=inputs, settings=settings)
        self._batches_done += 1
        # 3. What is watched of it.
        with torch.no_grad():
            ce, distillation = parts_of(sums, counts, config.distillation)
            mass = loss.new_zeros(0)
            if config.distillation.needs == "topk":
                p = inputs["topk_logp"].exp()  # of the teacher at T = 1
                mass = p.masked_fill(~inputs["topk_kept"], 0.0).sum(dim=1)
            tokens, masked, chunks = inputs["tokens"], inputs["gold"].numel(), inputs["counts"][2]
            values = (loss, ce, distillation, 1, tokens, masked, chunks, mass.sum(), mass.numel())
            zero = self._sums.new_zeros(())
            self._sums += torch.stack([zero + value for value in values])
            newly_bad = (self._first_bad < 0) & ~torch.isfinite(loss)
            self._first_bad = torch.where(newly_bad, item, self._first_bad)
        return loss * self.accelerator.num_processes

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what is watched, and λ. TideError where a loss was not finite."""
        self.refuse_nonfinite()
        logs.pop("train_samples_per_second", None)  # to transformers a whole batch is one sample
        if "loss" in logs:
            logs = {**logs, **self._watched()}
            if getattr(self.config.distillation, "tidal", None) is not None:
                logs["tidal_lambda_train"] = lambda_train(self.config.distillation, self.progress)
        dataset: Any = self.train_dataset
        done = self.state.global_step * self.config.accumulation * self.accelerator.num_processes
        self.state.epoch = dataset.epochs_in(done)  # to transformers the whole run is one epoch
        super().log(logs, *args, **kwargs)
        if self.is_world_process_zero():
            step, steps = self.state.global_step, self.state.max_steps
            progress = json.dumps({"step": step, "max_steps": steps, **logs})
            write_bytes(self.config.out / "progress.json", (progress + "\n").encode())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """With the sums since the last log, of each process: a run may be stopped at any step."""
        self.refuse_nonfinite()
        sums: Any = self.accelerator.gather(self._sums[None])
        kept: Any = self.state.stateful_callbacks
        kept["sums"] = sums.tolist()
        super()._save_checkpoint(model, trial)

    def _load_callback_state(self) -> None:
        """Called with a checkpoint's state: how often it logs, saves, scores may have changed."""
        self.state.compute_steps(self.args, self.state.max_steps)
        super()._load_callback_state()
        rank = self.accelerator.process_index
        kept: Any = self.state.stateful_callbacks
        sums = self._sums.new_tensor(kept.pop("sums", []))
        if len(sums) == self.accelerator.num_processes:
            self._sums += sums[rank]
        elif rank == 0:  # other processes, or none, share the work now
            self._sums += sums.sum(dim=0)

    def _watched(self) -> dict[str, float]:
        """Means since the last log, over all processes; then begins anew."""
        reduced: Any = self.accelerator.reduce(self._sums, "sum")
        sums = dict(zip(_SUMS, reduced.tolist(), strict=True))
        self._sums.zero_()
        before, self._since = self._since, time.perf_counter()
        passes = self.config.accumulation * self.accelerator.num_processes
        steps = max(sums["batches"] / passes, 1)
        logs = {name: sums[name] / steps for name in ("loss", "denoise", "distillation")}
        logs |= {"masked_positions": sums["masked"] / steps}
        logs |= {"active_chunks": sums["chunks"] / steps}
        if sums["mass_rows"]:
            logs["teacher_mass_in_topk"] = sums["mass"] / sums["mass_rows"]
        logs["tokens_per_second"] = sums["tokens"] / max(self._since - before, 1e-9)
        if torch.cuda.is_available():
            logs["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return logs

    def refuse_nonfinite(self) -> None:
        """TideError, with the batch saved, where a loss since the start was not finite."""
        firsts: Any = self.accelerator.gather(self._first_bad.reshape(1))
        items = [first for first in firsts.tolist() if first >= 0]
        if not items:
            return
        item = min(items)
        dataset: Any = self.train_dataset
        config, processes = self.config, self.accelerator.num_processes
        step, out = item // processes // config.accumulation, config.out
        # The passes of all processes one after the other, or one: so `tide replay` takes a step.
        joined = 1 if config.global_batch else processes
        passes = {"global_batch": config.global_batch, "batch_size": joined * config.batch_size}
        ids = [row.example_id for row in dataset.rows(item)]
        tensors = {k: v.contiguous() for k, v in dataset[item].items() if torch.is_tensor(v)}
        write_bytes(out / f"{NONFINITE}.safetensors", save(tensors))
        note = {"step": step, "batch": item // joined, "passes": passes, "example_ids": ids}
        write_bytes(out / f"{NONFINITE}.json", (json.dumps(note, indent=1) + "\n").encode())
        some = ", ".join(ids[:8]) + (", …" if len(ids) > 8 else "")
        raise TideError(
            f"the loss was not finite at step {step}; examples {some}",
            fix=f"`tide replay {out}` shows where it breaks; a lower learning_rate or "
            "precision=float32 often helps. Checkpoints before the step are kept",
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out scores (`masked_nll`), logged as eval_heldout_…; once for a step."""
        if self.heldout is None:
            return {}
        for entry in self.state.log_history:
            if entry["step"] == self.state.global_step and "eval_heldout_nll" in entry:
                return {k: v for k, v in entry.items() if k.startswith("eval_heldout_")}
        model = self.accelerator.unwrap_model(self.model)
        scores = masked_nll(model, self.heldout, lambda batch: model(batch=batch))
        metrics = {f"eval_heldout_{name}": value for name, value in scores.items()}
        self.log(metrics)
        return metrics
