"""Do machine, settings, cache and the run's folder fit? All that is refused before a run begins.

`run.json` says what a run's folder holds, so that no other run goes on in it.
"""

import importlib.util
import json
import logging
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shared.cache.manifest import Manifest, differences
from shared.settings.build import to_plain
from shared.settings.config import Distillation, Taught, TrainConfig
from shared.system.files import TideError, read_json, write_bytes
from shared.system.hardware import choose_device, choose_precision, explain_precision
from student_train.batches.loader import OpenCache

logger = logging.getLogger(__name__)

_RUN = "run.json"
# Settings that change nothing of what is trained; of the cache its digest is compared.
_MAY_CHANGE = {"log_steps", "checkpoint_steps", "eval_steps", "report_to", "run_name",
               "loader_workers", "store_cache_gb", "cache", "store"}  # fmt: skip
# Settings that name a place; what lies there is compared by its content.
_PLACES = {"heldout": "source", "student": "checkpoint"}


def preflight(config: TrainConfig, processes: int) -> tuple[TrainConfig, OpenCache]:
    """The settings with all that was left open decided, and the cache, opened.

    TideError with the first thing that does not fit; a warning for what the paper advises against,
    and where most of the cache has nothing for the objective.
    """
    # 1. What the settings ask of the machine.
    check_machine(config, processes)
    # 2. Precision: a run that exists keeps what it was begun with, on whatever machine it goes on.
    device = choose_device(config.device)
    begun = recorded_run(config.out).get("config", {}).get("precision")
    precision = choose_precision(config.precision, device, begun)
    if config.precision == "auto" and os.environ.get("RANK", "0") == "0":
        logger.info("precision %s", explain_precision(precision, device, begun))
    if on_gpu(config) and processes == 1 and (gpus := torch.cuda.device_count()) > 1:
        how = "`torchrun --nproc-per-node %d -m pipelines.cli train …` (or `accelerate launch`)"
        logger.warning(f"one GPU of %d is used; for all of them: {how}", gpus, gpus)
    # 3. How the rows of a step are divided, and the attention that the device has.
    config = settle_batch(replace(config, precision=precision), processes)
    if config.student.attention == "auto":
        attention = "flex" if on_gpu(config) else "sdpa"
        config = replace(config, student=replace(config.student, attention=attention))
    # 4. The cache, and whether it holds what the objective needs.
    opened = OpenCache(config)
    manifest = opened.manifest
    rows = sum(entry.rows for entry in opened.ledger.values())
    bare = sum(entry.rows_without_chunks for entry in opened.ledger.values())
    tables = opened.layout.tables
    mapped = tables is not None and tables.token_map is not None
    check_objective(config.distillation, manifest, config.cache, rows, bare, mapped)
    if config.draws_per_step > manifest.draws:
        raise TideError(
            f"draws_per_step is {config.draws_per_step}; {config.cache} has {manifest.draws} draws",
            fix="grow the cache: run the same `tide cache` with a larger --draws",
        )
    return config, opened


def on_gpu(config: TrainConfig) -> bool:
    return config.device != "cpu" and torch.cuda.is_available()


def check_machine(config: TrainConfig, processes: int) -> None:
    """TideError where trackers, attention, `parallel` or the optimizer need what is not there."""
    missing = [name for name in config.report_to if importlib.util.find_spec(name) is None]
    no_accelerator = config.device == "cpu" or not torch.accelerator.is_available()
    fsdp, eight_bit = config.parallel == "fsdp", config.optimizer == "adamw_8bit"
    flex = config.student.attention == "flex" and not on_gpu(config)
    # `accelerate launch --cpu` starts one process, and tells it where others would be met.
    alone = "MASTER_ADDR" in os.environ and "RANK" not in os.environ
    alone = alone and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    torchrun = "start with `torchrun --nproc-per-node N -m pipelines.cli train …`"
    for wrong, what, fix in (
        (missing, f"report_to names {missing}, not installed", "install it, or take it out"),
        (flex, "student.attention is flex, and this run is on a CPU", "leave it out: SDPA is used"),
        (alone, "accelerate launch --cpu started one process, and was asked for several",
         "start with `accelerate launch --multi_gpu --num_processes N …`, and set device=cpu"),
        (fsdp and no_accelerator, "parallel is fsdp, and this run is on a CPU", "use parallel=ddp"),
        (fsdp and processes < 2, "parallel is fsdp, and there is one process", torchrun),
        (fsdp and config.student.lora, "parallel is fsdp, and student.lora is set",
         "use parallel=ddp: what is trained under LoRA is small"),
        (eight_bit and importlib.util.find_spec("bitsandbytes") is None,
         "optimizer is adamw_8bit, and bitsandbytes is not installed", "pip install bitsandbytes"),
        (eight_bit and not on_gpu(config),
         "optimizer is adamw_8bit, and this run is on a CPU", "use optimizer=adamw"),
    ):  # fmt: skip
        if wrong:
            raise TideError(what, fix=fix)


def settle_batch(config: TrainConfig, processes: int) -> TrainConfig:
    """`batch_size` and `accumulation` as `global_batch` and the number of processes have them.

    Of n processes each sees B / n rows of a global batch B, in the largest equal passes of at most
    `batch_size` rows that hold all draws of their examples. TideError where these do not divide.
    """
    whole, draws = config.global_batch, config.draws_per_step
    if whole is None:
        if config.batch_size % draws:
            what = f"batch_size is {config.batch_size}, and draws_per_step is {draws}"
            raise TideError(what, expected=f"a batch_size that is a multiple of {draws}")
        return config
    unit = processes * draws
    if whole % unit:
        raise TideError(
            f"global_batch is {whole}, for {processes} processes and examples of {draws} draws",
            expected=f"a multiple of {unit}, such as {-(-whole // unit) * unit}",
        )
    each = whole // processes
    most = min(each, max(config.batch_size, draws))
    size = max(n for n in range(draws, most + 1, draws) if each % n == 0)
    if config.accumulation not in (1, each // size):
        raise TideError(
            f"accumulation is {config.accumulation}, and global_batch {whole} over {processes} "
            f"processes in passes of {size} makes it {each // size}",
            fix="leave accumulation out, or global_batch",
        )
    return replace(config, batch_size=size, accumulation=each // size)


def halved(config: TrainConfig, processes: int) -> TrainConfig | None:
    """The same rows and gradient a step with less memory: in passes half as large, if they do not
    see other rows then; at last with checkpointing. None where nothing is left.
    """
    others = config.global_batch is None and config.accumulation > 1
    if others or config.batch_size <= config.draws_per_step:
        again = replace(config, gradient_checkpointing=True)
        return None if config.gradient_checkpointing else again
    whole = config.global_batch or config.batch_size * processes
    half = replace(config, global_batch=whole, batch_size=config.batch_size // 2, accumulation=1)
    return settle_batch(half, processes)


def check_objective(
    settings: Distillation, manifest: Manifest, cache: Path, rows: int, bare: int, mapped: bool
) -> None:
    """TideError where the cache lacks what the objective needs; a warning where most rows (`bare`)
    have no chunk, or the paper advises against it. `mapped`: the cache has a map between tokens.
    """
    if not isinstance(settings, Taught):
        return
    if settings.needs == "topk":
        if "topk" not in manifest.signals or not (manifest.shared_tokenizer or mapped):
            raise TideError(
                f"{settings.type} needs the teacher's logits; {cache} has none for this student",
                expected="the signal topk of a teacher that shares the student's tokenizer, or the "
                "signals topk and chunks of another",
                fix="use calm or reverse_calm, or a cache with that",
            )
    elif "chunks" not in manifest.signals:
        what = f"{settings.type} needs the signal chunks, and {cache} does not have it"
        raise TideError(what, fix='build a cache with targets.signals=["topk","chunks"]')
    elif bare == rows:
        fix = "see `tide prepare --show 3`: the tokenizers align nowhere; or train with type=none"
        raise TideError(f"{settings.type} learns from chunks, and {cache} has none", fix=fix)
    elif bare > rows / 2:
        text = f"{bare:,} of {rows:,} rows of {cache} have no chunk: they train cross-entropy alone"
        warnings.warn(text, stacklevel=2)
    if settings.tidal is not None and settings.type.startswith("reverse"):
        text = f"TIDAL with {settings.type}: the paper advises against it with a reverse objective"
        warnings.warn(text, stacklevel=2)


def recorded_run(out: Path) -> dict[str, Any]:
    """What run.json says of the run in `out`; {} where there is none, TideError where damaged."""
    path = out / _RUN
    if not path.exists():
        return {}
    try:
        about = read_json(path)
        if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
            raise ValueError("it describes no run")
    except ValueError as error:
        fix = "delete the run's folder and train again"
        raise TideError(f"{path} is damaged: {error}", fix=fix) from error
    return about


def begin_or_go_on(config: TrainConfig, processes: int, run: dict[str, Any]) -> None:
    """Write what this run is, or refuse to go on with another one.

    `run`: its cache's digest and draws, its steps, and by section the digests (`contents`) of what
    `_PLACES` name. It may be looked at otherwise (`_MAY_CHANGE`), and become longer, which is said.
    """
    settings = to_plain(config)
    settings.pop("out")
    # The same rows make a step, however it is divided, and however many processes share it.
    settings["batch_size"] *= processes
    if config.global_batch is not None:
        del settings["batch_size"], settings["accumulation"]
    this = json.loads(json.dumps({"config": settings, **run}))
    before, steps = recorded_run(config.out), run["steps"]
    if before:
        longer = steps > before.get("steps", steps)
        free = _MAY_CHANGE | ({"epochs", "max_steps"} if longer else set())
        same = []  # what must be the same in both
        for about in (before, this):
            own = {name: value for name, value in about["config"].items() if name not in free}
            for section, name in _PLACES.items() if "contents" in before else ():
                own[section] = own.get(section) and {**own[section], name: None}
            same.append({"contents": run["contents"], **about, "config": own, "steps": None})
        if lines := differences(*same):
            what = [f"{config.out} holds a run with other settings (run → now):", *lines]
            fix = "give back the old settings, or choose another folder (--out)"
            raise TideError("\n    ".join(what), fix=fix)
        if longer:
            logger.info("extended from %d steps to %d, schedules too", before["steps"], steps)
    if before != this:
        write_bytes(config.out / _RUN, (json.dumps(this, indent=2) + "\n").encode())
