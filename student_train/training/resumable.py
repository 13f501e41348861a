"""Hugging Face's Trainer, made safe against kill -9: it goes on from the last whole checkpoint.

A checkpoint is a folder `checkpoint-STEP` of several files. Its marker `COMPLETE` is written last
and holds the SHA-256 of each, so that a folder that was half written, or changed since, is never
gone on from.
"""

import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, no_type_check

import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import should_reduce_batch_size
from torch.utils._pytree import tree_map_only
from transformers import Trainer, TrainingArguments

from shared.cache.manifest import Manifest
from shared.settings.build import to_plain
from shared.settings.config import TrainConfig
from shared.system.files import sha256_of, write_bytes
from shared.system.processes import stop_is_asked
from student_train.training.preflight import on_gpu

logger = logging.getLogger(__name__)

MARKER = "COMPLETE"
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_READ_BY_TRAINER = (".pt", ".pth", ".bin", ".safetensors")
_KEPT = 2
_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit"}


class Checkpoint(NamedTuple):
    """A whole checkpoint: its optimizer step, and the seconds of training up to it."""

    folder: Path
    step: int
    seconds: float


def _by_step(place: Path) -> list[tuple[int, Path]]:
    names = [(path, _NAME.fullmatch(path.name)) for path in place.glob("checkpoint-*")]
    return sorted((int(name[1]), path) for path, name in names if name and path.is_dir())


def whole_checkpoints(place: Path) -> list[Checkpoint]:
    """Marked checkpoints whose hashes hold, oldest first; damaged ones are named in the log."""
    whole = []
    for step, folder in _by_step(place):
        if not (folder / MARKER).exists():
            continue
        try:
            note = json.loads((folder / MARKER).read_text())
            seconds, files = float(note["seconds"]), dict(note["files"])
            if note["step"] != step:
                raise ValueError(f"{MARKER} is that of step {note['step']}")
            for name, digest in files.items():
                if sha256_of(folder / name) != digest:
                    raise ValueError(f"{name} is not what was written")
            for path in folder.rglob("*"):
                known = path.relative_to(folder).as_posix() in files
                if path.suffix in _READ_BY_TRAINER and not known:
                    raise ValueError(f"{path.name} was not written with it")
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("checkpoint %s is damaged and not used: %s", folder, error)
        else:
            whole.append(Checkpoint(folder, step, seconds))
    return whole


@no_type_check  # its inherited fields are not all of the types that transformers states
class RecordedArguments(TrainingArguments):
    """TrainingArguments that tell trackers of `tide` too, the run's own settings."""

    tide: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "tide": self.tide}

    @property
    def n_gpu(self) -> int:
        """One process, one GPU: of several, transformers would make `nn.DataParallel`."""
        return min(1, super().n_gpu)


def training_arguments(config: TrainConfig, manifest: Manifest, steps: int) -> RecordedArguments:
    """TrainingArguments of a run. Trackers log the settings as `tide`, with the cache's digest."""
    # `accelerate launch` states a plan of its own beside torchrun's variables. Ours is in `config`.
    plans = ("ACCELERATE_MIXED", "ACCELERATE_DYNAMO", "ACCELERATE_USE", "ACCELERATE_GRADIENT",
             "ACCELERATE_DEEPSPEED", "FSDP_")  # fmt: skip
    for name in [name for name in os.environ if name.startswith(plans)]:
        del os.environ[name]
    # One folder, the run's own, for all its resumptions.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(config.out / "tensorboard")
    workers = int(on_gpu(config)) if config.loader_workers < 0 else config.loader_workers
    settings: dict[str, Any] = {}
    if workers:
        # With 16 batches ready, those of the next shards are decoded while the last are trained on.
        # Of a process that has CUDA and threads nothing may be forked.
        settings |= {"dataloader_num_workers": workers, "dataloader_prefetch_factor": 16}
        settings |= {"dataloader_persistent_workers": True}
        settings |= {"dataloader_multiprocessing_context": "spawn"}
    if config.parallel == "fsdp":
        settings |= {"fsdp": True, "fsdp_config": {"version": 2}}
    arguments = RecordedArguments(
        str(config.out / "checkpoints"),
        use_cpu=config.device == "cpu" or not torch.accelerator.is_available(),
        run_name=config.run_name or config.out.name,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=config.accumulation,
        max_steps=steps,
        train_sampling_strategy="sequential",  # the data set itself is the run's shuffled plan
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=math.ceil(config.warmup_ratio * steps),
        lr_scheduler_type=config.schedule,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bfloat16",
        seed=config.seed,
        save_steps=config.checkpoint_steps,
        save_total_limit=None,  # transformers goes by dates, and clocks step back
        logging_steps=config.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="no" if config.heldout is None else "steps",
        eval_steps=config.eval_steps,
        report_to=[*config.report_to],
        ddp_find_unused_parameters=False,
        optim=_OPTIMIZERS.get(config.optimizer, config.optimizer),
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"non_blocking": torch.cuda.is_available()},
        **settings,
    )
    about = {"cache_digest": manifest.digest, "teacher": manifest.fingerprint.teacher.name}
    arguments.tide = json.loads(json.dumps({**to_plain(config), **about}))
    return arguments


class ResumableTrainer(Trainer):
    """A Trainer that goes on from the last whole checkpoint in its output folder, and keeps two.

    A signal ends it after a step, with a checkpoint: where `told`, in all processes or none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Losses are divided by global counts, not by the loop.
        self.model_accepts_loss_kwargs = True
        self._began = time.monotonic()  # less the seconds before an interruption
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self.asked: list[float] = []  # when this process had a signal
        self.told: Any = self.asked
        self._stopped = False
        # Within `_save_checkpoint`: what is written while training goes on.
        self._later: list[Callable[[], object]] | None = None

    @property
    def seconds_trained(self) -> float:
        """Seconds of training, those before an interruption included."""
        return time.monotonic() - self._began

    def train_resuming(self, smaller: bool = False) -> bool:
        """From the last whole checkpoint to the end, or to a signal (KeyboardInterrupt). False:
        memory ran out, and `smaller` passes can help; what one process did is a checkpoint then.
        """
        place = Path(str(self.args.output_dir))
        last: list[Any] = [None]
        if self.args.process_index == 0:
            whole = whole_checkpoints(place)
            # Make room for steps that will be computed again: half-written checkpoints go, damaged
            # ones are put aside. Nothing without a checkpoint's name is touched.
            for _, folder in _by_step(place):
                if folder in [checkpoint.folder for checkpoint in whole]:
                    continue
                if (folder / MARKER).exists():
                    aside = folder.with_name(f"damaged-{folder.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    folder.rename(aside)
                else:
                    shutil.rmtree(folder)
            if whole:
                last = [(str(whole[-1].folder), whole[-1].seconds)]
                said = "the run goes on from step %d of %d; more epochs or max_steps extend it"
                logger.info(said, whole[-1].step, self.args.max_steps)
        if self.args.world_size > 1:
            broadcast_object_list(last)  # on a shared file system all must see the same
        folder, seconds = last[0] or (None, 0.0)
        self._began = time.monotonic() - seconds
        self.args.eval_on_start = self.eval_dataset is not None and folder is None
        with stop_is_asked("stops after this step, with a checkpoint") as self.asked:
            try:
                self.train(resume_from_checkpoint=folder)
            except RuntimeError as error:
                if not smaller or not should_reduce_batch_size(error):
                    raise
                done = self.state.global_step
                logger.warning("out of memory after step %d", done)
                if done > 0 and self.args.world_size == 1:
                    self._save_checkpoint(self.model, None)
                return False
            finally:
                self._finish_checkpoint()
        if self._stopped:
            raise KeyboardInterrupt
        return True

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps and not self._stopped and self.told:
            self._stopped = self.control.should_save = self.control.should_training_stop = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Weights and optimizer state are copied to host memory, and written while training goes
        on, but what is sharded (FSDP). Then one process marks it, and deletes old ones.
        """
        self._finish_checkpoint()
        self._later = None if self.is_fsdp_enabled else []
        super()._save_checkpoint(model, trial)
        later = self._later or []
        self._later = None
        self.accelerator.wait_for_everyone()
        if not self.is_world_process_zero():
            return
        place, step = Path(str(self.args.output_dir)), self.state.global_step
        seconds = self.seconds_trained

        def write_and_mark() -> None:
            for write in later:
                write()
            # 1. Its files are synced, then the marker declares it whole.
            folder, files = place / f"checkpoint-{step}", {}
            for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER):
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
                files[path.relative_to(folder).as_posix()] = sha256_of(path)
            note = {"step": step, "seconds": round(seconds, 3), "files": files}
            write_bytes(folder / MARKER, (json.dumps(note, indent=1) + "\n").encode())
            # 2. All marked ones but two go, by their steps, whatever their dates: the marker first,
            #    so that one killed on the way is half written, not damaged.
            marked = [path for _, path in _by_step(place) if (path / MARKER).exists()]
            for old in marked[:-_KEPT]:
                (old / MARKER).unlink()
                shutil.rmtree(old)

        self._pending = self._writer.submit(write_and_mark)
        if self.is_fsdp_enabled:
            self._finish_checkpoint()

    def _finish_checkpoint(self) -> None:
        """Wait for the checkpoint that is being written, and raise what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._later is None or output_dir is None:
            super()._save(output_dir, state_dict)
            return
        model: Any = self.model
        state = model.state_dict() if state_dict is None else state_dict
        # What an adapter leaves frozen is not written: a resumed run loads it from where it lies.
        weights = model.named_parameters(remove_duplicate=False)
        frozen = {name for name, weight in weights if not weight.requires_grad}
        state = _in_host_memory({name: state[name] for name in state if name not in frozen})
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        self._later.append(partial(super()._save, output_dir, state))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._later is None:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            owners: tuple[Any, Any] = self.optimizer, self.lr_scheduler
            for name, owner in zip(("optimizer.pt", "scheduler.pt"), owners, strict=True):
                state = _in_host_memory(owner.state_dict())
                self._later.append(partial(torch.save, state, Path(output_dir) / name))


def _in_host_memory(state: Any) -> Any:
    """The same with copies of its tensors, which training does not change."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)
