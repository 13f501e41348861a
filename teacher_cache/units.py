"""The units of a run, with their examples, and their computation in one process under a progress bar."""

from __future__ import annotations

from collections.abc import Sequence

from shared.examples import Prepared
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


def examples_of(plan: CachePlan, unit: Unit) -> list[Prepared]:
    """The prepared examples of `unit`."""
    size = plan.config.shard_examples
    return plan.data.between(unit.part * size, (unit.part + 1) * size)


def sources(plan: CachePlan, units: Sequence[Unit]) -> Source:
    """Each unit with its examples."""
    for unit in units:
        yield unit, examples_of(plan, unit)
