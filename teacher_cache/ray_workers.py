"""Data parallelism over a Ray cluster: actors with a copy of the teacher each, units of work as idempotent tasks.

The cache's folder must be the same place for driver and nodes; the driver shows the progress. An actor that is lost
(its node, its GPU) is replaced and its unit computed again: a shard is whole or absent, so twice is the same as once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from shared.errors import TideError
from shared.shards import Unit
from teacher_cache.plan import CachePlan
from teacher_cache.progress import Progress
from teacher_cache.ray_cluster import connect

_LOSSES = 20


class _Copy:
    """What an actor is: one copy of the teacher."""

    def __init__(self, plan: CachePlan) -> None:
        from teacher_cache.engines.choose import load_engine

        self._plan, self._engine = plan, load_engine(plan)

    def compute(self, unit: Unit) -> tuple[int, float]:
        """Write the shard of one unit; its examples, and how long the engine was busy."""
        from teacher_cache.overlap import run_pipeline
        from teacher_cache.units import examples_of

        found = (0, 0.0)

        def heard(work: Any, busy: float) -> None:
            nonlocal found
            found = (work.examples, busy)

        run_pipeline(self._plan, self._engine, iter([(unit, examples_of(self._plan, unit))]), heard)
        return found

    def tables(self) -> None:
        """Score the pilot sample and write the tables."""
        from teacher_cache.tables.pilot import make_tables

        make_tables(self._plan, self._engine)


class _Pool:
    """Actors, and the unit that each has in hand."""

    def __init__(self, plan: CachePlan, units: Sequence[Unit]) -> None:
        import ray
        import ray.exceptions

        self._ray, self._exceptions = ray, ray.exceptions
        self._plan = ray.put(plan)
        engine = plan.config.engine
        gpus = engine.tensor_parallel if ray.cluster_resources().get("GPU") else 0
        self._actor = ray.remote(num_gpus=gpus, num_cpus=1)(_Copy)
        self._todo = deque(units)
        self._running: dict[Any, tuple[Any, Unit]] = {}
        self._losses = 0
        for _ in range(min(engine.data_parallel, len(units))):
            self._give(self._actor.remote(self._plan))

    def _give(self, actor: Any) -> None:
        if self._todo:
            unit = self._todo.popleft()
            self._running[actor.compute.remote(unit)] = (actor, unit)

    def run(self, progress: Progress, engines: int) -> None:
        """Until every unit is written. TideError where an actor meets one, or too many are lost."""
        while self._running:
            (ready,), _ = self._ray.wait(list(self._running), num_returns=1)
            actor, unit = self._running.pop(ready)
            try:
                examples, busy = self._ray.get(ready)
            except self._exceptions.RayActorError as error:
                self._lost(unit, error)
                progress.failed()
                continue
            except self._exceptions.RayTaskError as error:
                cause = error.cause
                if isinstance(cause, TideError):
                    raise cause from error
                raise TideError(f"unit {unit} failed on a Ray node: {cause}", fix="see Ray's logs") from error
            progress.wrote(unit, examples, busy, engines)
            self._give(actor)

    def _lost(self, unit: Unit, error: Exception) -> None:
        self._losses += 1
        if self._losses > _LOSSES:
            raise TideError(
                f"{self._losses} Ray actors were lost, the last with: {error}",
                fix="run the same command again: finished shards are kept. A lack of memory is the usual reason: "
                "lower engine.tokens_per_batch",
            ) from error
        tqdm.write("a Ray actor was lost; another takes its place")
        self._todo.appendleft(unit)
        self._give(self._actor.remote(self._plan))


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
        raise TideError(f"the pilot sample failed on a Ray node: {error.cause}", fix="see Ray's logs") from error
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
