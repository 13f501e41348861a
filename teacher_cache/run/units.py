"""The units of a run, with their examples, and their computation in one process under a progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shared.aligned.examples import Prepared
from shared.cache.shards import Unit
from teacher_cache.engines.base import Engine
from teacher_cache.run.overlap import Source, run_pipeline
from teacher_cache.run.plan import CachePlan
from teacher_cache.run.progress import Progress
from teacher_cache.run.work import UnitWork
from teacher_cache.teachers.registry import Full


def run_units(plan: CachePlan, engine: Engine, units: Sequence[Unit]) -> None:
    """Compute `units` in order, one shard each, under a progress bar."""
    with Progress(plan, units) as progress:

        def heard(work: UnitWork, busy_seconds: float) -> None:
            progress.wrote(work.unit, work.examples, busy_seconds)

        run_pipeline(plan, engine, sources(plan, together(plan, units)), heard)


def examples_of(plan: CachePlan, unit: Unit) -> list[Prepared]:
    """The prepared examples of `unit`."""
    size = plan.config.shard_examples
    return plan.data.between(unit.part * size, (unit.part + 1) * size)


def together(plan: CachePlan, units: Sequence[Unit]) -> list[list[Unit]]:
    """The units in groups that are scored together: where passes share a clean copy (`engines.packs`), all draws of a
    part; else each alone.
    """
    if isinstance(plan.entry.attention, Full):
        return [[unit] for unit in units]
    groups: dict[int, list[Unit]] = {}
    for unit in units:
        groups.setdefault(unit.part, []).append(unit)
    return list(groups.values())


def sources(plan: CachePlan, groups: Iterable[Sequence[Unit]]) -> Source:
    """Each group with its examples."""
    for group in groups:
        examples = examples_of(plan, group[0])
        yield [
            (unit, examples if unit.part == group[0].part else examples_of(plan, unit))
            for unit in group
        ]
