"""Stage one: run the teacher once over every missing unit and write its shard."""

from __future__ import annotations

import dataclasses
import fcntl
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.atomic import remove_leftovers
from shared.config import CacheConfig
from shared.errors import TideError
from shared.prepared.folder import totals
from shared.prepared.report import losses
from shared.shards import CACHE, Unit, shard_counts
from shared.stores import Store
from teacher_cache.engines.choose import load_engine
from teacher_cache.plan import CachePlan, make_plan
from teacher_cache.ray_workers import run_ray
from teacher_cache.units import run_units
from teacher_cache.workers import run_workers


@dataclass(frozen=True)
class CacheReport:
    """What a finished cache holds."""

    folder: Path
    rows: int
    masked: int
    chunks: int
    bytes: int
    computed: int
    kept: int
    elsewhere: int
    """Shards that other ranks compute, or that only the store has."""
    counts: Counter[str]
    """Of the data: rows, what was left out by reason, what was cut or lost (`shared.prepared`)."""
    notes: list[str]
    """The same in words: what was left out, cut, or lost its alignment."""


def build_cache(config: CacheConfig) -> CacheReport:
    """Compute every missing shard of the cache at `config.out`; finished ones are skipped.

    Raises TideError on anything that the user can mend, before the teacher is loaded where that is possible.
    """
    store = None if config.store is None else Store.open(config.store)
    with _only_writer(config):
        if store is not None:
            store.bring_manifest(config.out)
        plan = make_plan(config)
        if store is not None:
            plan = dataclasses.replace(plan, stored=store.begin(config.out, plan.manifest))
        missing = plan.missing
        remove_leftovers([config.out] if config.world == 1 else [unit.path(config.out) for unit in missing])
        if missing:
            _run(plan, missing)
        if store is not None:
            store.push(config.out, plan.manifest)
        return summarise(plan, len(missing))


def _run(plan: CachePlan, missing: list[Unit]) -> None:
    if plan.config.engine.workers == "ray":
        run_ray(plan, missing)
    elif plan.config.engine.data_parallel > 1:
        run_workers(plan, missing)
    else:
        with closing(load_engine(plan)) as engine:
            run_units(plan, engine, missing)


@contextmanager
def _only_writer(config: CacheConfig) -> Iterator[None]:
    """Hold the cache's lock. The system drops it with the process, however that ends.

    Runs of one `world` share the cache's lock and each holds that of its rank.
    """
    folder = config.out
    locks = [(".lock", fcntl.LOCK_EX)]
    if config.world > 1:
        locks = [(".lock", fcntl.LOCK_SH), (f".lock-{config.rank}-of-{config.world}", fcntl.LOCK_EX)]
    with ExitStack() as held:
        for name, kind in locks:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                handle = held.enter_context((folder / name).open("w"))
            except OSError as error:
                raise TideError(f"{folder} cannot be written: {error.strerror}", fix="choose another folder") from error
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
            except OSError as error:
                raise TideError(
                    f"another process is writing the cache {folder}", fix="wait for it, or choose another folder"
                ) from error
        yield


def summarise(plan: CachePlan, computed: int) -> CacheReport:
    """Add up the counts that the shards at hand carry."""
    out = plan.config.out
    total: Counter[str] = Counter()
    size = 0
    units = plan.manifest.units()
    here = [unit for unit in units if unit.path(out).exists()]
    for unit in here:
        path = unit.path(out)
        counts = shard_counts(path, plan.manifest.digest)
        total.update({name: n for name, n in counts.items() if name != CACHE})
        size += path.stat().st_size
    kept, elsewhere = len(here) - computed, len(units) - len(here)
    return CacheReport(
        out,
        total["rows"],
        total["masked"],
        total["chunks"],
        size,
        computed,
        kept,
        elsewhere,
        Counter(totals(plan.data.record.sources)),
        losses(plan.data),
    )
