"""Do machine, settings and cache fit? Everything that can be refused before a student is loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import warnings
from pathlib import Path

import torch

from shared.cache.manifest import Manifest
from shared.settings.config import TrainConfig
from shared.settings.objectives import (
    KL,
    Calm,
    Distillation,
    NoDistillation,
    ReverseCalm,
    ReverseKL,
)
from shared.system.errors import TideError
from shared.system.hardware import choose_device, choose_precision, explain_precision
from student_train.batches.open_cache import OpenCache, open_cache
from student_train.training.run_folder import recorded_settings

logger = logging.getLogger(__name__)


def preflight(config: TrainConfig, processes: int) -> tuple[TrainConfig, OpenCache]:
    """The settings with all that was left open decided, and the cache, opened.

    TideError with the first thing that does not fit; a warning for what the paper advises against,
    and where most of the cache has nothing for the objective.
    """
    # 1. What the settings ask of the machine.
    check_machine(config, processes)
    # 2. Precision: a run that exists keeps what it was begun with, on whatever machine it goes on.
    device = choose_device(config.device)
    begun = recorded_settings(config.out).get("precision")
    precision = choose_precision(config.precision, device, begun)
    if config.precision == "auto" and is_first():
        logger.info("precision %s", explain_precision(precision, device, begun))
    # 3. How the rows of a step are divided, and the attention that the device has.
    config = settle_batch(dataclasses.replace(config, precision=precision), processes)
    if config.student.attention == "auto":
        attention = "flex" if on_gpu(config) else "sdpa"
        config = dataclasses.replace(
            config, student=dataclasses.replace(config.student, attention=attention)
        )
    # 4. The cache, and whether it holds what the objective needs.
    opened = open_cache(config)
    manifest = opened.manifest
    check_objective(config.distillation, manifest, config.cache)
    entries = opened.ledger.values()
    check_chunks(
        config.distillation,
        config.cache,
        rows=sum(entry.rows for entry in entries),
        bare=sum(entry.rows_without_chunks for entry in entries),
    )
    if config.draws_per_step > manifest.draws:
        raise TideError(
            f"draws_per_step is {config.draws_per_step}, and {config.cache} has {manifest.draws} "
            "draws "
            "of an example",
            expected=f"at most {manifest.draws}",
            fix="grow the cache: run the same `tide cache` with a larger --draws",
        )
    return config, opened


def is_first() -> bool:
    """Whether this process is the first of the run's, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def on_gpu(config: TrainConfig) -> bool:
    """Whether the run is on CUDA."""
    return config.device != "cpu" and torch.cuda.is_available()


def compiles(config: TrainConfig) -> bool:
    """Whether layers and loss are compiled."""
    return config.compile == "on" or (config.compile == "auto" and on_gpu(config))


def check_machine(config: TrainConfig, processes: int) -> None:
    """TideError where trackers, attention, `parallel` or the optimizer need what is not there."""
    for name in config.report_to:
        if importlib.util.find_spec(name) is None:
            raise TideError(
                f"report_to names {name}, which is not installed",
                fix=f"pip install {name}, or take it out of report_to",
            )
    if config.student.attention == "flex" and not on_gpu(config):
        raise TideError(
            "student.attention is flex, and on a CPU PyTorch has no gradient for flex_attention",
            fix="leave student.attention out: SDPA is used there",
        )
    if config.parallel == "fsdp" and (
        config.device == "cpu" or not torch.accelerator.is_available()
    ):
        raise TideError(
            "parallel is fsdp, and this run is on a CPU",
            fix="use parallel=ddp, or a machine with GPUs",
        )
    if config.parallel == "fsdp" and processes < 2:
        raise TideError(
            "parallel is fsdp, and there is one process",
            expected="several, one a GPU",
            fix="start with `torchrun --nproc-per-node N -m pipelines.cli train …`, or leave it "
            "out",
        )
    if config.optimizer == "adamw_8bit":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise TideError(
                "optimizer is adamw_8bit, and bitsandbytes is not installed",
                fix="pip install bitsandbytes",
            )
        if not on_gpu(config):
            raise TideError(
                "optimizer is adamw_8bit, and this run is on a CPU", fix="use optimizer=adamw"
            )


def settle_batch(config: TrainConfig, processes: int) -> TrainConfig:
    """`batch_size` and `accumulation` as `global_batch` and the number of processes have them.

    With n processes and a global batch B each process sees B / n rows a step, in the largest equal
    passes of at most `batch_size` rows that hold all draws of their examples. TideError where these
    do not divide.
    """
    whole, draws = config.global_batch, config.draws_per_step
    if whole is None:
        if config.batch_size % draws:
            raise TideError(
                f"batch_size is {config.batch_size} and draws_per_step {draws}: a batch holds all "
                f"{draws} draws of each of its examples",
                expected=f"a multiple of {draws}",
                fix="change batch_size or draws_per_step",
            )
        return config
    unit = processes * draws
    if whole % unit:
        raise TideError(
            f"global_batch is {whole}, and {processes} processes cannot share it evenly in "
            f"examples of {draws} draws",
            expected=f"a multiple of {unit}, such as {-(-whole // unit) * unit}",
            fix="change the number of processes, or --set global_batch=…",
        )
    each = whole // processes
    most = min(each, max(config.batch_size, draws))
    size = max(n for n in range(draws, most + 1, draws) if each % n == 0)
    if config.accumulation not in (1, each // size):
        raise TideError(
            f"accumulation is {config.accumulation}, and global_batch {whole} over {processes} "
            "processes in passes "
            f"of {size} makes it {each // size}",
            fix="leave accumulation out, or global_batch",
        )
    return dataclasses.replace(config, batch_size=size, accumulation=each // size)


def check_objective(settings: Distillation, manifest: Manifest, cache: Path) -> None:
    """TideError where the cache lacks what the objective needs; a warning where the paper advises
    against it.
    """
    match settings:
        case NoDistillation():
            return
        case KL() | ReverseKL():
            if "topk" not in manifest.signals or not manifest.shared_tokenizer:
                raise TideError(
                    f"{settings.type} compares token distributions, and {cache} has none in the "
                    "student's vocabulary",
                    expected="a cache with the signal topk from a teacher that shares the "
                    "student's tokenizer",
                    fix="use calm or reverse_calm, or a cache from such a teacher",
                )
            if settings.temperature not in manifest.temperatures:
                raise TideError(
                    f"the temperature {settings.temperature} is not in the cache {cache}",
                    expected=f"one of {', '.join(map(str, manifest.temperatures))}",
                    fix="choose one of these, or build a cache with targets.temperatures that "
                    "includes it",
                )
        case Calm() | ReverseCalm():
            if "chunks" not in manifest.signals:
                raise TideError(
                    f"{settings.type} needs chunk likelihoods, and {cache} has only "
                    f"{', '.join(manifest.signals)}",
                    fix='build a cache with targets.signals=["topk","chunks"]',
                )
    if settings.tidal is not None and isinstance(settings, ReverseKL | ReverseCalm):
        warnings.warn(
            f"TIDAL with {settings.type}: the paper advises against TIDAL with a reverse objective",
            stacklevel=2,
        )


def check_chunks(settings: Distillation, cache: Path, rows: int, bare: int) -> None:
    """TideError where no row has a chunk for an objective over chunks; a warning where most
    (`bare`) have none.
    """
    if not isinstance(settings, Calm | ReverseCalm):
        return
    if bare == rows:
        raise TideError(
            f"{settings.type} learns from chunks, and {cache} has none",
            fix="look at `tide prepare --show 3`: the two tokenizers align nowhere; or train with "
            "type=none",
        )
    if bare > rows / 2:
        warnings.warn(
            f"{bare:,} of {rows:,} rows of {cache} have no chunk: they are trained by "
            "cross-entropy alone",
            stacklevel=2,
        )
