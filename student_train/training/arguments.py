"""A run's settings in the words of Hugging Face's Trainer."""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from transformers.integrations.integration_utils import TensorBoardCallback

from shared.cache.manifest import Manifest
from shared.settings.build import to_plain
from shared.settings.config import TrainConfig
from student_train.training.preflight import loader_workers
from student_train.training.resumable import training_arguments

_AHEAD = 16
"""Batches that a process of the loader has ready."""

TENSORBOARD = "tensorboard"

_OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "adafactor": "adafactor",
}
"""In transformers' names."""


def arguments(config: TrainConfig, manifest: Manifest, steps: int, evaluates: bool) -> Any:
    """TrainingArguments of a run of `steps` steps; trackers log the settings as `tide`, with the cache's digest."""
    about = {"cache_digest": manifest.digest, "teacher": manifest.fingerprint.teacher.name}
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
        report_to=[name for name in config.report_to if name != TENSORBOARD],
        ddp_find_unused_parameters=False,
        optim=_OPTIMIZERS[config.optimizer],
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        **_loading(loader_workers(config)),
        **({"use_cpu": True} if config.device == "cpu" else {}),
        **({"fsdp": True, "fsdp_config": {"version": 2}} if config.parallel == "fsdp" else {}),
    )
    made.tide = json.loads(json.dumps({**to_plain(config), **about}))
    return made


def _loading(workers: int) -> dict[str, Any]:
    """Batches made ahead by `workers` processes, and copied to the device while it computes. They are many ahead, so
    that the next shards are decoded while the last ones are trained on.
    """
    ahead = {} if not workers else {
        "dataloader_num_workers": workers,
        "dataloader_prefetch_factor": _AHEAD,
        "dataloader_persistent_workers": True,
        "dataloader_multiprocessing_context": "spawn",  # of a process that has CUDA and threads nothing may be forked
    }  # fmt: skip
    on_cuda = torch.cuda.is_available()
    return {
        **ahead,
        "dataloader_pin_memory": on_cuda,
        "accelerator_config": {"non_blocking": on_cuda},
    }


def tensorboard(config: TrainConfig) -> list[TensorBoardCallback]:
    """TensorBoard in the run's own folder, one place for all its resumptions; nothing where it is not asked for."""
    if TENSORBOARD not in config.report_to:
        return []
    callback = TensorBoardCallback()
    callback.logging_dir = str(config.out / TENSORBOARD)
    return [callback]
