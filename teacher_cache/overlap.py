"""Stage one as a pipeline: units are prepared ahead of the engine and written behind it, so that it never waits.

Preparing and writing run in threads (tokenising, compressing and most of NumPy release the interpreter's lock), or
preparing in worker processes where `engine.prepare_workers` asks for them. At most a few units are in memory.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from shared.data import ChatExample
from shared.shards import Unit, write_shard
from teacher_cache.engines.base import Engine
from teacher_cache.plan import CachePlan
from teacher_cache.targets import Scores
from teacher_cache.work import UnitWork, finish_unit, prepare_unit

Source = Iterator[tuple[Unit, list[ChatExample]]]

_worker_plan: CachePlan | None = None


def _start_worker(plan: CachePlan) -> None:
    global _worker_plan  # noqa: PLW0603 - a worker process has one plan for its whole life
    _worker_plan = plan


def _prepare_in_worker(unit: Unit, examples: list[ChatExample]) -> UnitWork:
    assert _worker_plan is not None
    return prepare_unit(_worker_plan, unit, examples)


@contextmanager
def preparing(plan: CachePlan, workers: int) -> Iterator[Callable[[Unit, list[ChatExample]], Future[UnitWork]]]:
    """A function that starts preparing a unit: in one thread (`workers` 0), or in that many processes."""
    pool: Executor
    if workers:
        context = multiprocessing.get_context("spawn")  # threads of the model do not survive a fork
        pool = ProcessPoolExecutor(workers, context, _start_worker, (plan,))
        prepare = partial(pool.submit, _prepare_in_worker)
    else:
        pool = ThreadPoolExecutor(1, "prepare")
        prepare = partial(pool.submit, prepare_unit, plan)
    try:
        yield prepare
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def prepared_ahead(plan: CachePlan, source: Source, workers: int) -> Iterator[UnitWork]:
    """The units of `source` in their order, read and prepared while the caller works on earlier ones."""
    with preparing(plan, workers) as prepare, ThreadPoolExecutor(1, "read") as reader:
        waiting: deque[Future[UnitWork]] = deque()
        item = reader.submit(next, source, None)
        while (read := item.result()) is not None:
            item = reader.submit(next, source, None)
            waiting.append(prepare(*read))
            if len(waiting) > max(1, workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def run_pipeline(plan: CachePlan, engine: Engine, source: Source, progress: Callable[[UnitWork, float], None]) -> None:
    """Score every unit and write its shard. `progress` hears of each written unit, and for how many seconds the engine
    was busy with it. What was scored is written even when a later unit fails or Ctrl-C comes.
    """
    pending: deque[tuple[UnitWork, float, Future[None]]] = deque()

    def settle(allowed: int) -> None:
        while len(pending) > allowed:
            work, busy, future = pending.popleft()
            future.result()
            progress(work, busy)

    with ThreadPoolExecutor(1, "write") as writer:
        try:
            for work in prepared_ahead(plan, source, plan.config.engine.prepare_workers):
                begun = time.perf_counter()
                scores = engine.score(work.requests)
                busy = time.perf_counter() - begun
                pending.append((work, busy, writer.submit(_write, plan, work, scores)))
                settle(1)
        finally:
            settle(0)


def _write(plan: CachePlan, work: UnitWork, scores: Sequence[Scores]) -> None:
    rows, counts = finish_unit(plan, work, scores)
    write_shard(work.unit.path(plan.config.out), rows, plan.target_spec().temperatures, counts)
