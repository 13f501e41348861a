"""Stage one as a pipeline: units are drawn ahead of the engine and written behind it, so that it never waits.

Both run in threads (decompressing, compressing and most of NumPy release the interpreter's lock). At most a few units
are in memory. Texts are long tokens by then (`teacher_cache.prepared`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from shared.aligned.examples import Prepared
from shared.cache.ledger import Entry, note
from shared.cache.shards import Unit, write_shard
from teacher_cache.engines.base import Engine
from teacher_cache.method.targets import Scores
from teacher_cache.run.plan import CachePlan
from teacher_cache.run.work import UnitWork, finish_unit, prepare_unit

Group = list[tuple[Unit, list[Prepared]]]
"""Units that are scored together, with their examples."""
Source = Iterator[Group]
_AHEAD = 2


def drawn_ahead(plan: CachePlan, source: Source) -> Iterator[list[UnitWork]]:
    """The groups of `source` in their order, read and drawn in a thread while the caller works on earlier ones."""

    def work() -> list[UnitWork] | None:
        read = next(source, None)
        return None if read is None else [prepare_unit(plan, *one) for one in read]

    with ThreadPoolExecutor(1, "draw") as reader:
        waiting = deque([reader.submit(work) for _ in range(_AHEAD)])
        while (found := waiting.popleft().result()) is not None:
            waiting.append(reader.submit(work))
            yield found


def score_together(engine: Engine, works: Sequence[UnitWork]) -> tuple[list[list[Scores]], float]:
    """The scores of each unit, all scored in one go, and for how many seconds the engine was busy with each."""
    begun = time.perf_counter()
    scores = iter(engine.score([request for work in works for request in work.requests]))
    each = [[next(scores) for _ in work.requests] for work in works]
    return each, (time.perf_counter() - begun) / len(works)


def run_pipeline(
    plan: CachePlan, engine: Engine, source: Source, progress: Callable[[UnitWork, float], None]
) -> None:
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
            for works in drawn_ahead(plan, source):
                scores, busy = score_together(engine, works)
                for work, own in zip(works, scores, strict=True):
                    pending.append((work, busy, writer.submit(write_unit, plan, work, own)))
                settle(len(works))
        finally:
            settle(0)


def write_unit(plan: CachePlan, work: UnitWork, scores: Sequence[Scores]) -> None:
    """Write the shard of a unit and its entry for the ledger."""
    rows, counts = finish_unit(plan, work, scores)
    content = write_shard(work.unit.path(plan.config.out), rows, plan.layout, counts)
    note(plan.config.out, work.unit, Entry.of(content, {**counts, "rows": len(rows)}))
