"""Stage one: run the teacher once over every missing unit and write its shard."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from shared.cache.ledger import Ledger, settle_ledger
from shared.cache.shards import Unit
from shared.cache.stores import Store
from shared.settings.config import CacheConfig
from shared.system.atomic import remove_leftovers
from shared.system.locks import hold
from teacher_cache.engines.base import Engine
from teacher_cache.prepared.folder import totals
from teacher_cache.prepared.report import losses
from teacher_cache.run.load_engine import load_engine
from teacher_cache.run.plan import CachePlan, make_plan
from teacher_cache.run.ray_workers import run_ray, tables_by_ray
from teacher_cache.run.tables.pilot import make_tables
from teacher_cache.run.tables.settle import settle_tables
from teacher_cache.run.units import run_units
from teacher_cache.run.workers import run_workers, tables_by_worker


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
    """Of the data: rows, what was left out by reason, what was cut or lost (`teacher_cache.prepared`)."""
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
        engine = _Engine()
        with closing(engine):
            plan = settle_tables(plan, engine.make_tables, store)
            return _fill(plan, engine, store)


def _fill(plan: CachePlan, engine: _Engine, store: Store | None) -> CacheReport:
    """Compute what is missing of a cache whose manifest is written."""
    out = plan.config.out
    if store is not None:
        plan = dataclasses.replace(plan, stored=store.begin(out, plan.manifest))
    missing = plan.missing
    remove_leftovers([out] if plan.config.world == 1 else [unit.path(out) for unit in missing])
    if missing:
        engine.run(plan, missing)
    ledger = settle_ledger(out, plan.manifest)
    if store is not None:
        store.push(out, plan.manifest, ledger)
    return summarise(plan, len(missing), ledger)


class _Engine:
    """Runs the teacher, in this process or in others; one that was loaded for the tables is kept for the shards."""

    def __init__(self) -> None:
        self._loaded: Engine | None = None

    def make_tables(self, plan: CachePlan) -> None:
        """Score the pilot sample where the teacher will run."""
        if plan.config.engine.workers == "ray":
            tables_by_ray(plan)
        elif plan.config.engine.data_parallel > 1:
            tables_by_worker(plan)
        else:
            self._loaded = load_engine(plan)
            make_tables(plan, self._loaded)

    def run(self, plan: CachePlan, missing: list[Unit]) -> None:
        """Compute units."""
        if plan.config.engine.workers == "ray":
            run_ray(plan, missing)
        elif plan.config.engine.data_parallel > 1:
            run_workers(plan, missing)
        else:
            if self._loaded is None:
                self._loaded = load_engine(plan)
            elif plan.vocabulary is not None:
                self._loaded.use_classes(plan.vocabulary.class_of)
            run_units(plan, self._loaded, missing)

    def close(self) -> None:
        """Give back what was loaded."""
        if self._loaded is not None:
            self._loaded.close()


@contextmanager
def _only_writer(config: CacheConfig) -> Iterator[None]:
    """Hold the cache's lock. The system drops it with the process, however that ends.

    Runs of one `world` share the cache's lock and each holds that of its rank.
    """
    what = f"the cache {config.out}"
    with ExitStack() as held:
        held.enter_context(hold(config.out / ".lock", what, shared=config.world > 1))
        if config.world > 1:
            name = f".lock-{config.rank}-of-{config.world}"
            held.enter_context(hold(config.out / name, f"rank {config.rank} of {what}"))
        yield


def summarise(plan: CachePlan, computed: int, ledger: Ledger) -> CacheReport:
    """Add up what the shards at hand hold."""
    entries = ledger.values()
    kept, elsewhere = len(ledger) - computed, len(plan.manifest.units()) - len(ledger)
    return CacheReport(
        plan.config.out,
        sum(entry.rows for entry in entries),
        sum(entry.masked for entry in entries),
        sum(entry.chunks for entry in entries),
        sum(entry.bytes for entry in entries),
        computed,
        kept,
        elsewhere,
        Counter(totals(plan.data.record.sources)),
        losses(plan.data),
    )
