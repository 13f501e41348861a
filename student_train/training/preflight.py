"""Do cache, objective and installation fit? Checked before a student is loaded."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from shared.cache.manifest import Manifest
from shared.settings.config import StudentConfig, TrainConfig
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
from student_train.training.run_folder import recorded_settings


def check_trackers(names: Sequence[str]) -> None:
    """TideError where a tracker of `report_to` is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise TideError(
                f"report_to names {name}, which is not installed",
                fix=f"pip install {name}, or take it out of report_to",
            )


def check_hardware(config: TrainConfig) -> None:
    """TideError where `parallel` or `student.attention` asks for what is not there."""
    if config.student.attention == "flex" and (
        config.device == "cpu" or not torch.cuda.is_available()
    ):
        raise TideError(
            "student.attention is flex, and this run is on a CPU, where PyTorch has no gradient for flex_attention",
            fix="leave student.attention out: SDPA is used there",
        )
    if config.parallel == "fsdp" and (
        config.device == "cpu" or not torch.accelerator.is_available()
    ):
        raise TideError(
            "parallel is fsdp, and this run is on a CPU",
            fix="use parallel=ddp, or a machine with GPUs",
        )
    if config.parallel == "fsdp" and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise TideError(
            "parallel is fsdp, and there is one process",
            expected="several, one a GPU",
            fix="start with `torchrun --nproc-per-node N -m pipelines.cli train …`, or leave parallel out",
        )


def check_optimizer(config: TrainConfig) -> None:
    """TideError where `optimizer` needs what is not installed, or a device that is not there."""
    if config.optimizer != "adamw_8bit":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise TideError(
            "optimizer is adamw_8bit, and bitsandbytes is not installed",
            fix="pip install bitsandbytes",
        )
    if config.device == "cpu" or not torch.cuda.is_available():
        raise TideError(
            "optimizer is adamw_8bit, and this run is on a CPU", fix="use optimizer=adamw"
        )


def settle_precision(config: TrainConfig) -> TrainConfig:
    """The settings with `precision` decided; said on stderr where it was left open.

    A run that exists keeps what it was begun with, on whatever machine it goes on.
    """
    device = choose_device(config.device)
    begun = recorded_settings(config.out).get("precision")
    chosen = choose_precision(config.precision, device, begun)
    if config.precision == "auto" and int(os.environ.get("RANK", "0")) == 0:
        print(f"precision {explain_precision(chosen, device, begun)}", file=sys.stderr)
    return dataclasses.replace(config, precision=chosen)


def settle_batch(config: TrainConfig, processes: int) -> TrainConfig:
    """The settings with `batch_size` and `accumulation` as `global_batch` and the number of processes have them.
    TideError where `draws_per_step` does not divide it.
    """
    whole, draws = config.global_batch, config.draws_per_step
    if whole is None:
        if config.batch_size % draws:
            raise TideError(
                f"batch_size is {config.batch_size} and draws_per_step {draws}: a batch holds all {draws} draws of "
                "each of its examples",
                expected=f"a multiple of {draws}, such as {-(-config.batch_size // draws) * draws}",
                fix="change batch_size or draws_per_step",
            )
        return config
    unit = processes * draws
    if whole % unit:
        raise TideError(
            f"global_batch is {whole}, and {processes} processes cannot share it evenly"
            + (f" in examples of {draws} draws" if draws > 1 else ""),
            expected=f"a multiple of {unit}, such as {-(-whole // unit) * unit}",
            fix="change the number of processes, or --set global_batch=…",
        )
    each = whole // processes
    fits = [
        n
        for n in range(draws, min(each, max(config.batch_size, draws)) + 1, draws)
        if each % n == 0
    ]
    size = max(fits)
    if config.accumulation not in (1, each // size):
        raise TideError(
            f"accumulation is {config.accumulation}, and global_batch {whole} over {processes} processes in passes of "
            f"{size} makes it {each // size}",
            fix="leave accumulation out, or global_batch",
        )
    return dataclasses.replace(config, batch_size=size, accumulation=each // size)


def check_draws(config: TrainConfig, manifest: Manifest) -> None:
    """TideError where a step wants more draws of an example than the cache has."""
    if config.draws_per_step > manifest.draws:
        raise TideError(
            f"draws_per_step is {config.draws_per_step}, and {config.cache} has {manifest.draws} draws of an example",
            expected=f"at most {manifest.draws}",
            fix="grow the cache: run the same `tide cache` with a larger --draws",
        )


def settle_attention(config: TrainConfig) -> StudentConfig:
    """The student's settings with `attention` decided."""
    if config.student.attention != "auto":
        return config.student
    return dataclasses.replace(config.student, attention="flex" if on_gpu(config) else "sdpa")


def on_gpu(config: TrainConfig) -> bool:
    """Whether the run is on CUDA."""
    return config.device != "cpu" and torch.cuda.is_available()


def compiles(config: TrainConfig) -> bool:
    """Whether layers and loss are compiled."""
    return config.compile == "on" or (config.compile == "auto" and on_gpu(config))


def loader_workers(config: TrainConfig) -> int:
    """Processes that work ahead of each trainer."""
    return (1 if on_gpu(config) else 0) if config.loader_workers < 0 else config.loader_workers


def check_targets(settings: Distillation, totals: Mapping[str, int], cache: Path) -> None:
    """TideError where the whole cache has nothing for the objective; a warning where most rows have nothing."""
    if not isinstance(settings, Calm | ReverseCalm):
        return
    if not totals["chunks"]:
        raise TideError(
            f"{settings.type} learns from chunks, and {cache} has none",
            fix="look at `tide prepare --show 3`: the two tokenizers align nowhere; or train with type=none",
        )
    bare = totals["rows_without_chunks"]
    if bare > totals["rows"] / 2:
        warnings.warn(
            f"{bare:,} of {totals['rows']:,} rows of {cache} have no chunk: they are trained by cross-entropy alone",
            stacklevel=2,
        )


def check_objective(settings: Distillation, manifest: Manifest, cache: Path) -> None:
    """TideError where the cache lacks what the objective needs; one warning where the paper advises against it."""
    match settings:
        case NoDistillation():
            return
        case KL() | ReverseKL():
            if "topk" not in manifest.signals or not manifest.shared_tokenizer:
                raise TideError(
                    f"{settings.type} compares token distributions, and {cache} has none in the student's vocabulary",
                    expected="a cache with the signal topk from a teacher that shares the student's tokenizer",
                    fix="use calm or reverse_calm, or a cache from such a teacher",
                )
            if settings.temperature not in manifest.temperatures:
                raise TideError(
                    f"the temperature {settings.temperature} is not in the cache {cache}",
                    expected=f"one of {', '.join(map(str, manifest.temperatures))}",
                    fix="choose one of these, or build a cache with targets.temperatures that includes it",
                )
        case Calm() | ReverseCalm():
            if "chunks" not in manifest.signals:
                raise TideError(
                    f"{settings.type} needs chunk likelihoods, and {cache} has only {', '.join(manifest.signals)}",
                    fix='build a cache with targets.signals=["topk","chunks"]',
                )
    if settings.tidal is not None and isinstance(settings, ReverseKL | ReverseCalm):
        warnings.warn(
            f"TIDAL with {settings.type}: the paper advises against TIDAL with a reverse objective",
            stacklevel=2,
        )
