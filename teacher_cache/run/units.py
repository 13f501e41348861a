"""The units of a run, computed in this process as a pipeline: they are drawn ahead of the engine
and written behind it, so that it never waits.

Both run in threads: decompressing, compressing and most of NumPy release the interpreter's lock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from shared.aligned.examples import Prepared
from shared.cache.ledger import Entry, note
from shared.cache.shards import Unit, write_shard
from teacher_cache.engines.base import Engine
from teacher_cache.method.targets import Scores
from teacher_cache.run.open import Run
from teacher_cache.run.progress import Progress
from teacher_cache.run.work import UnitWork, finish_unit, prepare_unit
from teacher_cache.teachers.registry import Full

_AHEAD = 2  # groups of units in memory before the engine asks for them


def run_units(run: Run, engine: Engine, units: Sequence[Unit]) -> None:
    """Score `units` and write a shard for each, under a progress bar.

    What was scored is written even when a later unit fails or Ctrl-C comes.
    """
    groups = iter(together(run, units))

    def draw() -> list[UnitWork] | None:
        group = next(groups, None)
        if group is None:
            return None
        examples = examples_of(run, group[0])
        return [prepare_unit(run, unit, examples) for unit in group]

    def write(work: UnitWork, scores: Sequence[Scores]) -> None:
        rows, counts = finish_unit(run, work, scores)
        content = write_shard(work.unit.path(run.config.out), rows, run.layout, counts)
        note(run.config.out, work.unit, Entry.of(content, {**counts, "rows": len(rows)}))

    pending: deque[tuple[UnitWork, float, Future[None]]] = deque()
    with (
        Progress(run, units) as progress,
        ThreadPoolExecutor(1, "draw") as drawer,
        ThreadPoolExecutor(1, "write") as writer,
    ):

        def settle(most: int) -> None:
            while len(pending) > most:
                work, busy_seconds, written = pending.popleft()
                written.result()
                progress.wrote(work.unit, work.examples, busy_seconds)

        drawn = deque(drawer.submit(draw) for _ in range(_AHEAD))
        try:
            while (works := drawn.popleft().result()) is not None:
                drawn.append(drawer.submit(draw))
                begun = time.perf_counter()
                scores = iter(engine.score([each for work in works for each in work.requests]))
                own = [[next(scores) for _ in work.requests] for work in works]
                busy_seconds = (time.perf_counter() - begun) / len(works)
                for work, of_work in zip(works, own, strict=True):
                    pending.append((work, busy_seconds, writer.submit(write, work, of_work)))
                settle(len(works))
        finally:
            settle(0)


def examples_of(run: Run, unit: Unit) -> list[Prepared]:
    """The prepared examples of `unit`."""
    size = run.config.shard_examples
    return run.data.between(unit.part * size, (unit.part + 1) * size)


def together(run: Run, units: Sequence[Unit]) -> list[list[Unit]]:
    """Units in groups that are scored together: all draws of a part where passes share a clean copy
    (`engines.packs`), else each alone.
    """
    if isinstance(run.entry.attention, Full):
        return [[unit] for unit in units]
    groups: dict[int, list[Unit]] = {}
    for unit in units:
        groups.setdefault(unit.part, []).append(unit)
    return list(groups.values())
