"""`engine.data_parallel`: several copies of the teacher, each a run of its own rank.

A rank is the same command with `--rank` and `--world`; ranks share a folder and nothing else. Here
they are processes of this machine or tasks of a Ray cluster. A process that dies is not replaced:
the others finish, and the same command computes what is missing. Ray runs a task again whose node
is lost; a shard is whole or absent, so twice is the same as once.
"""

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from itertools import chain
from typing import Any

from tqdm import tqdm

from shared.cache.shards import finished_units
from shared.cache.vocabulary import has_tables
from shared.settings.build import build, to_plain
from shared.settings.config import CacheConfig
from shared.system.errors import TideError
from shared.system.processes import (
    end_children,
    end_with_parent,
    leave_in_order,
    start_child,
    stop_in_order,
)
from teacher_cache.run.open import Run
from teacher_cache.run.preflight import ray_cluster
from teacher_cache.run.progress import read_status, write_metrics

_LOOK_SECONDS = 0.5
_ERROR = "tide: error: "


def run_ranks(run: Run) -> None:
    """Compute what is missing by ranks under one progress bar. TideError where one fails."""
    config, ranks = run.config, []
    alone = dataclasses.replace(config.engine, data_parallel=1, workers="local")
    for i in range(config.engine.data_parallel):
        # Rank r of `world` becomes the ranks r, r + world, r + 2 world, …: their units are its own.
        rank = dataclasses.replace(
            config,
            rank=config.rank + config.world * i,
            world=config.world * config.engine.data_parallel,
            metrics_file=None,
            engine=alone,
        )
        if dataclasses.replace(run, config=rank).missing:
            ranks.append(rank)
    units = set(run.missing)
    running = _on_ray(ranks) if config.engine.workers == "ray" else _on_this_machine(ranks)
    total = sum(run.examples_in(unit) for unit in units)
    with closing(running), tqdm(total=total, unit="row", desc=f"cache {config.teacher}") as bar:
        for _ in chain(running, [None]):  # one more look when all are done
            written = units & set(finished_units(config.out))
            bar.update(sum(run.examples_in(unit) for unit in written))
            units -= written
            if config.metrics_file is not None:
                write_metrics(config.metrics_file, read_status(config.out), config.teacher)
            time.sleep(_LOOK_SECONDS)


def _on_this_machine(ranks: Sequence[CacheConfig]) -> Generator[None, None, None]:
    """Yields while processes run, each with GPUs of its own."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    each = ranks[0].engine.tensor_parallel
    gpus = named.split(",") if named else [str(i) for i in range(len(ranks) * each)]
    with ExitStack() as stack:
        children, logs = [], []
        stack.callback(end_children, children)
        for i, config in enumerate(ranks):
            visible = ",".join(gpus[i * each : (i + 1) * each])
            environment = {"CUDA_VISIBLE_DEVICES": visible, "TQDM_DISABLE": "1"}
            values = json.dumps(to_plain(config))
            command = [sys.executable, "-m", "teacher_cache.run.ranks", values]
            logs.append(stack.enter_context(tempfile.TemporaryFile()))
            children.append(start_child(command, environment, logs[-1]))
        while any(child.poll() is None for child in children):
            yield
            # Ranks that share only a store would wait for the tables of one that failed.
            failed = any(child.poll() for child in children)
            if failed and ranks[0].store is not None and not has_tables(ranks[0].out):
                break
        for config, child, log in zip(ranks, children, logs, strict=True):
            if child.poll():
                log.seek(0)
                said = log.read().decode(errors="replace").rpartition(_ERROR)[2].strip()
                raise _failed(config, f"exit code {child.returncode}\n{said[-2000:]}")


def _on_ray(ranks: Sequence[CacheConfig]) -> Generator[None, None, None]:
    """Yields while tasks run."""
    ray = ray_cluster()
    gpus = ranks[0].engine.tensor_parallel if ray.cluster_resources().get("GPU") else 0
    task = ray.remote(num_gpus=gpus, num_cpus=1)(run_rank)
    tasks = {task.remote(to_plain(config)): config for config in ranks}
    failures: list[tuple[CacheConfig, Any]] = []
    waiting = list(tasks)
    while waiting:
        done, waiting = ray.wait(waiting, timeout=_LOOK_SECONDS)
        for one in done:
            try:
                ray.get(one)
            except ray.exceptions.RayError as error:
                failures.append((tasks[one], getattr(error, "cause", error)))
        yield
    for config, error in failures:
        raise _failed(config, str(error)) from error


def _failed(config: CacheConfig, reason: str) -> TideError:
    return TideError(
        f"rank {config.rank} of {config.world} ended early: {reason}",
        fix="run the same command again: finished shards are kept. Exit code -9 is often a lack of "
        "memory: lower engine.data_parallel or engine.tokens_per_batch",
    )


def run_rank(values: dict[str, Any]) -> None:
    """One rank, from its settings as plain values."""
    from teacher_cache.run.build import build_cache

    build_cache(build(CacheConfig, values))


if __name__ == "__main__":
    stop_in_order()
    end_with_parent()
    try:
        run_rank(json.loads(sys.argv[1]))
    except TideError as problem:
        print(f"{_ERROR}{problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(leave_in_order())
