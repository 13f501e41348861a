"""Stage one as a pipeline: units are drawn ahead of the engine and written behind it, so that it never waits.

Both run in threads (decompressing, compressing and most of NumPy release the interpreter's lock). At most a few units
are in memory. Texts are long tokens by then (`shared.prepared`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from shared.examples import Prepared
from shared.ledger import Entry, note
from shared.shards import Unit, write_shard
from teacher_cache.engines.base import Engine
from teacher_cache.plan import CachePlan
from teacher_cache.targets import Scores
from teacher_cache.work import UnitWork, finish_unit, prepare_unit

Source = Iterator[tuple[Unit, list[Prepared]]]
_AHEAD = 2


def drawn_ahead(plan: CachePlan, source: Source) -> Iterator[UnitWork]:
    """The units of `source` in their order, read and drawn in a thread while the caller works on earlier ones."""

    def work() -> UnitWork | None:
        read = next(source, None)
        return None if read is None else prepare_unit(plan, *read)

    with ThreadPoolExecutor(1, "draw") as reader:
        waiting = deque([reader.submit(work) for _ in range(_AHEAD)])
        while (found := waiting.popleft().result()) is not None:
            waiting.append(reader.submit(work))
            yield found


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
            for work in drawn_ahead(plan, source):
                begun = time.perf_counter()
                scores = engine.score(work.requests)
                busy = time.perf_counter() - begun
                pending.append((work, busy, writer.submit(_write, plan, work, scores)))
                settle(1)
        finally:
            settle(0)


def _write(plan: CachePlan, work: UnitWork, scores: Sequence[Scores]) -> None:
    rows, counts = finish_unit(plan, work, scores)
    content = write_shard(work.unit.path(plan.config.out), rows, plan.layout, counts)
    note(plan.config.out, work.unit, Entry.of(content, {**counts, "rows": len(rows)}))
