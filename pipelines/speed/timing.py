"""Jobs timed in alternation, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

_ROUNDS = 5


def side_by_side(jobs: dict[str, Callable[[], object]], rounds: int = _ROUNDS) -> dict[str, float]:
    """Median seconds of each job, all jobs in turn in every round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}
