"""`make bench`: ratios measured side by side in one run. Absolute times are this machine's."""

import multiprocessing
import statistics
import timeit
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from pipelines.commands.app import print_table
from shared.system.files import TideError
from shared.system.hardware import high_water


def run_bench(only: str | None = None, paper: bool = False) -> None:
    """Print all tables, or one of them; with `paper` that of use at the paper's sizes."""
    from pipelines.speed.training import bench_head, bench_loader, bench_stages
    from pipelines.speed.use import bench_paper, bench_use

    tables = {"stages": bench_stages, "head": bench_head, "loader": bench_loader, "use": bench_use}
    tables = {"use": bench_paper} if paper else tables
    if only is not None and only not in tables:
        raise TideError(f"unknown table {only!r}", expected=f"one of {', '.join(tables)}")
    for name in [only] if only else tables:
        print_table(tables[name]())


def side_by_side(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each job. All run in turn, so that a busy machine slows them alike; the
    first round is to warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            seconds = timeit.timeit(job, number=1)
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def added_memory(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> int:
    """Bytes that the job which `prepare` returns adds to its process's high-water mark (Linux)."""
    job = prepare(*arguments)
    before = high_water()
    job()
    return high_water() - before
