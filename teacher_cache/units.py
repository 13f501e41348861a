"""The units of a run, with their examples, and their computation in one process under a progress bar."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from shared.data import ChatExample, iter_examples
from shared.shards import Unit
from teacher_cache.engines.base import Engine
from teacher_cache.overlap import Source, run_pipeline
from teacher_cache.plan import CachePlan
from teacher_cache.progress import Progress
from teacher_cache.work import UnitWork


def run_units(plan: CachePlan, engine: Engine, units: Sequence[Unit]) -> None:
    """Compute `units` in order, one shard each, under a progress bar."""
    with Progress(plan, units) as progress:

        def heard(work: UnitWork, busy_seconds: float) -> None:
            progress.wrote(work.unit, work.examples, busy_seconds)

        run_pipeline(plan, engine, sources(plan, units), heard)


class ExampleParts:
    """The examples of each unit, read from the data in one sweep a draw where units come in order."""

    def __init__(self, plan: CachePlan) -> None:
        self._config = plan.config
        self._examples: Iterator[ChatExample] = iter(())
        self._next = 0
        self._restart = True

    def examples(self, unit: Unit) -> list[ChatExample]:
        """The examples of `unit`."""
        if self._restart or unit.part < self._next:
            self._examples, self._next, self._restart = iter_examples(self._config.data), 0, False
        size = self._config.shard_examples
        skipped = (unit.part - self._next) * size
        self._next = unit.part + 1
        return list(itertools.islice(self._examples, skipped, skipped + size))


def sources(plan: CachePlan, units: Sequence[Unit]) -> Source:
    """Each unit with its examples."""
    parts = ExampleParts(plan)
    for unit in units:
        yield unit, parts.examples(unit)
