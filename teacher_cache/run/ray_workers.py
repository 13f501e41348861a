"""Data parallelism over a Ray cluster: actors with a copy of the teacher each, units of work as idempotent tasks.

The cache's folder must be the same place for driver and nodes; the driver shows the progress. An actor that is lost
(its node, its GPU) is replaced and its unit computed again: a shard is whole or absent, so twice is the same as once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from shared.cache.shards import Unit
from shared.system.errors import TideError
from teacher_cache.run.plan import CachePlan
from teacher_cache.run.progress import Progress
from teacher_cache.run.ray_cluster import connect
from teacher_cache.run.units import together

_LOSSES = 20
_IN_HAND = 3
"""Calls of one actor at a time: one draws, one has the engine, one writes."""


class _Copy:
    """What an actor is: one copy of the teacher. Several calls run at a time, of which one has the engine: the others
    draw what comes next and write what came before.
    """

    def __init__(self, plan: CachePlan) -> None:
        from teacher_cache.run.load_engine import load_engine

        self._plan, self._engine, self._free = plan, load_engine(plan), threading.Lock()

    def compute(self, units: list[Unit]) -> tuple[list[int], float]:
        """Write the shards of units that are scored together; the examples of each, and how long the engine was busy
        with each.
        """
        from teacher_cache.run.overlap import score_together, write_unit
        from teacher_cache.run.units import sources
        from teacher_cache.run.work import prepare_unit

        (group,) = sources(self._plan, [units])
        works = [prepare_unit(self._plan, *one) for one in group]
        with self._free:
            scores, busy = score_together(self._engine, works)
        for work, own in zip(works, scores, strict=True):
            write_unit(self._plan, work, own)
        return [work.examples for work in works], busy

    def tables(self) -> None:
        """Score the pilot sample and write the tables."""
        from teacher_cache.run.tables.pilot import make_tables

        make_tables(self._plan, self._engine)


class _Pool:
    """Actors, and the units that each has in hand."""

    def __init__(self, plan: CachePlan, units: Sequence[Unit]) -> None:
        import ray
        import ray.exceptions

        self._ray, self._exceptions = ray, ray.exceptions
        self._plan = ray.put(plan)
        engine = plan.config.engine
        gpus = engine.tensor_parallel if ray.cluster_resources().get("GPU") else 0
        remote: Any = ray.remote
        self._actor = remote(num_gpus=gpus, num_cpus=1, max_concurrency=_IN_HAND)(_Copy)
        self._todo = deque(together(plan, units))
        self._running: dict[Any, tuple[Any, list[Unit]]] = {}
        self._gone: set[Any] = set()
        self._newest: Any = None
        for actor in [
            self._actor.remote(self._plan)
            for _ in range(min(engine.data_parallel, len(self._todo)))
        ]:
            self._give(actor)
        for actor in [actor for actor, _ in self._running.values()]:
            for _ in range(_IN_HAND - 1):
                self._give(actor)

    def _give(self, actor: Any) -> None:
        if self._todo:
            units = self._todo.popleft()
            self._running[actor.compute.remote(units)] = (actor, units)

    def run(self, progress: Progress, engines: int) -> None:
        """Until every unit is written. TideError where an actor meets one, or too many are lost."""
        while self._running:
            (ready,), _ = self._ray.wait(list(self._running), num_returns=1)
            actor, units = self._running.pop(ready)
            try:
                examples, busy = self._ray.get(ready)
            except self._exceptions.RayActorError as error:
                self._lost(actor, units, error, progress)
                continue
            except self._exceptions.RayTaskError as error:
                cause = error.cause
                if isinstance(cause, TideError):
                    raise cause from error
                raise TideError(
                    f"units {units} failed on a Ray node: {cause}", fix="see Ray's logs"
                ) from error
            for unit, count in zip(units, examples, strict=True):
                progress.wrote(unit, count, busy, engines)
            self._give(actor)

    def _lost(self, actor: Any, units: list[Unit], error: Exception, progress: Progress) -> None:
        """Put back what an actor had in hand, and start another in its place; its calls fail one by one."""
        self._todo.appendleft(units)
        if actor not in self._gone:
            self._gone.add(actor)
            progress.failed()
            if len(self._gone) > _LOSSES:
                raise TideError(
                    f"{len(self._gone)} Ray actors were lost, the last with: {error}",
                    fix="run the same command again: finished shards are kept. A lack of memory is the usual reason: "
                    "lower engine.tokens_per_batch",
                ) from error
            tqdm.write("a Ray actor was lost; another takes its place")
            self._newest = self._actor.remote(self._plan)
            for _ in range(_IN_HAND):
                self._give(self._newest)
        else:  # all others may be done, and ask for nothing more
            self._give(self._newest)


def tables_by_ray(plan: CachePlan) -> None:
    """Score the pilot sample on one of the cluster's actors. TideError where it meets one, or is lost."""
    connect()
    import ray
    import ray.exceptions

    gpus = plan.config.engine.tensor_parallel if ray.cluster_resources().get("GPU") else 0
    actor: Any = ray.remote(num_gpus=gpus, num_cpus=1)(_Copy).remote(ray.put(plan))
    try:
        ray.get(actor.tables.remote())
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TideError):
            raise error.cause from error
        raise TideError(
            f"the pilot sample failed on a Ray node: {error.cause}", fix="see Ray's logs"
        ) from error
    except ray.exceptions.RayActorError as error:
        raise TideError(f"the Ray actor that scored the pilot sample was lost: {error}",
                        fix="run the same command again") from error  # fmt: skip
    finally:
        ray.kill(actor)


def run_ray(plan: CachePlan, units: Sequence[Unit]) -> None:
    """Compute `units` by `engine.data_parallel` actors of the cluster at hand."""
    connect()
    with Progress(plan, units) as progress:
        _Pool(plan, units).run(progress, plan.config.engine.data_parallel)
