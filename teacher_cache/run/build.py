"""Stage one: run the teacher once over every missing unit and write its shard.

With `engine.data_parallel` there are several copies of the teacher, each a run of its own rank, as
of a command with `--rank` and `--world`: processes of this machine, or tasks of a Ray cluster. They
share a folder and nothing else. A process that dies is not replaced: the others finish, and the
same command computes what is missing. Ray runs a task again whose node is lost; a shard is whole or
absent, so twice is the same as once.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from shared.cache.ledger import settle_ledger
from shared.cache.shards import finished_units, has_tables
from shared.cache.stores import Store
from shared.settings.build import build, to_plain
from shared.settings.config import CacheConfig
from shared.system import processes
from shared.system.files import TideError, new_folder, remove_leftovers
from shared.system.processes import hold
from teacher_cache.prepared.folder import losses
from teacher_cache.run.open import Run, open_or_begin
from teacher_cache.run.preflight import ray_cluster
from teacher_cache.run.progress import read_status, write_metrics
from teacher_cache.run.tables import settle_tables
from teacher_cache.run.work import Engine, load_engine, run_units

_LOOK_SECONDS = 0.5
_ERROR = "tide: error: "


@dataclass(frozen=True)
class CacheReport:
    folder: Path
    rows: int
    masked: int
    chunks: int
    bytes: int
    computed: int  # shards
    kept: int
    elsewhere: int  # that other ranks compute, or that only the store has
    notes: list[str]  # of the data: what was left out by reason, cut, or lost


def build_cache(config: CacheConfig) -> CacheReport:
    """Compute every missing shard of the cache at `config.out`; finished ones are skipped."""
    out = config.out
    store = None if config.store is None else Store.open(config.store)
    with ExitStack() as stack:
        # 1. Open: begin the cache, or go on with what is there or in the store.
        parallel = config.engine.data_parallel > 1 or config.engine.workers == "ray"
        stack.enter_context(only_writer(config, parallel))
        if store is not None:
            store.bring_manifest(out)
        run = open_or_begin(config)
        missing = run.missing
        # 2. A cache with a manifest has its tokenizers and tables: the manifest comes last.
        sides = {"student": run.student}
        if not run.entry.student_tokens:
            sides["teacher"] = run.teacher
        for side, tokenizer in sides.items():
            folder = out / f"{side}_tokenizer"
            if not folder.exists():
                with new_folder(folder) as half:
                    tokenizer.backend.save_pretrained(half)
        if parallel and missing:
            run_ranks(run)

        @cache
        def engine() -> Engine:
            return stack.enter_context(closing(load_engine(run)))

        run = settle_tables(run, engine, store)
        if store is not None:
            run = replace(run, stored=store.begin(out, run.manifest))
        # 3. Compute, where ranks have left something.
        left = run.missing
        remove_leftovers([out] if config.world == 1 else [unit.path(out) for unit in left])
        if left:
            if run.tables is not None:  # one that scored the pilot sample did not have them
                engine().use_tables(run.tables)
            run_units(run, engine(), left)
        # 4. What there is now.
        ledger = settle_ledger(out, run.manifest)
        if store is not None:
            store.push(out, run.manifest, ledger)
    sums = {}
    for name in ("rows", "masked", "chunks", "bytes"):
        sums[name] = sum(getattr(entry, name) for entry in ledger.values())
    computed = sum(unit in ledger for unit in missing)
    kept, elsewhere = len(ledger) - computed, len(run.manifest.units()) - len(ledger)
    counted = {"computed": computed, "kept": kept, "elsewhere": elsewhere, **sums}
    return CacheReport(out, notes=losses(run.data), **counted)


@contextmanager
def only_writer(config: CacheConfig, parallel: bool = False) -> Iterator[None]:
    """Hold the cache's lock: a rank that of its rank, whoever only starts ranks one of its own, the
    run of a whole cache `.lock`, where no rank is at work. It goes with the process.
    """
    out, what = config.out, f"the cache {config.out}"
    name = f"{config.rank}-of-{config.world}"
    with ExitStack() as held:
        if parallel:
            held.enter_context(hold(out / f".lock-start-{name}", f"rank {name} of {what}"))
        elif config.world > 1:
            held.enter_context(hold(out / f".lock-{name}", f"rank {name} of {what}"))
            with hold(out / ".lock", what, wait=True):
                pass  # nobody has the whole of it
        else:
            held.enter_context(hold(out / ".lock", what))
            for rank in out.glob(".lock-[0-9]*-of-*[0-9]"):
                with hold(rank, what):
                    pass
        yield


def run_ranks(run: Run) -> None:
    """Compute what is missing by ranks under one progress bar. TideError where one fails."""
    config, ranks = run.config, []
    alone = replace(config.engine, data_parallel=1, workers="local")
    world = config.world * config.engine.data_parallel
    # Rank r of `world` becomes the ranks r, r + world, r + 2 world, …: their units are its own.
    for number in range(config.rank, world, config.world):
        rank = replace(config, rank=number, world=world, metrics_file=None, engine=alone)
        if replace(run, config=rank).missing:
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
    named, each = os.environ.get("CUDA_VISIBLE_DEVICES"), ranks[0].engine.tensor_parallel
    gpus = named.split(",") if named else [str(i) for i in range(len(ranks) * each)]
    with ExitStack() as stack:
        children, logs = [], []
        stack.callback(processes.end_children, children)
        for i, config in enumerate(ranks):
            visible = ",".join(gpus[i * each : (i + 1) * each])
            environment = {"CUDA_VISIBLE_DEVICES": visible, "TQDM_DISABLE": "1"}
            values = json.dumps(to_plain(config))
            command = [sys.executable, "-m", "teacher_cache.run.build", values]
            logs.append(stack.enter_context(tempfile.TemporaryFile()))
            children.append(processes.start_child(command, environment, logs[-1]))
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
    ray = ray_cluster()
    gpus = ranks[0].engine.tensor_parallel if ray.cluster_resources().get("GPU") else 0
    task = ray.remote(num_gpus=gpus, num_cpus=1)(run_rank)
    tasks = {task.remote(to_plain(config)): config for config in ranks}
    waiting = list(tasks)
    while waiting:
        _, waiting = ray.wait(waiting, timeout=_LOOK_SECONDS)
        yield
    for one, config in tasks.items():
        try:
            ray.get(one)
        except ray.exceptions.RayError as error:
            raise _failed(config, str(getattr(error, "cause", error))) from error


def _failed(config: CacheConfig, reason: str) -> TideError:
    return TideError(
        f"rank {config.rank} of {config.world} ended early: {reason}",
        fix="run the same command again: finished shards are kept. Exit code -9 is often a lack of "
        "memory: lower engine.data_parallel or engine.tokens_per_batch",
    )


def run_rank(values: dict[str, Any]) -> None:
    build_cache(build(CacheConfig, values))


if __name__ == "__main__":
    processes.stop_in_order()
    processes.end_with_parent()
    try:
        run_rank(json.loads(sys.argv[1]))
    except TideError as problem:
        print(f"{_ERROR}{problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(processes.leave_in_order())
