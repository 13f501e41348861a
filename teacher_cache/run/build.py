"""Stage one: run the teacher once over every missing unit and write its shard."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from shared.cache.ledger import settle_ledger
from shared.cache.stores import Store
from shared.settings.config import CacheConfig
from shared.system.files import new_folder, remove_leftovers
from shared.system.processes import hold
from teacher_cache.engines.base import Engine
from teacher_cache.prepared.folder import totals
from teacher_cache.prepared.report import losses
from teacher_cache.run.load_engine import load_engine
from teacher_cache.run.open import open_or_begin
from teacher_cache.run.ranks import run_ranks
from teacher_cache.run.tables import make_tables, settle_tables
from teacher_cache.run.work import run_units


@dataclass(frozen=True)
class CacheReport:
    """What a finished cache holds."""

    folder: Path
    rows: int
    masked: int
    chunks: int
    bytes: int
    computed: int  # shards
    kept: int
    elsewhere: int
    """Shards that other ranks compute, or that only the store has."""
    counts: Counter[str]
    """Of the data: rows, what was left out by reason, what was cut or lost."""
    notes: list[str]
    """What was left out of the data, cut, or lost its alignment, in words."""


def build_cache(config: CacheConfig) -> CacheReport:
    """Compute every missing shard of the cache at `config.out`; finished ones are skipped.

    Raises TideError on anything that the user can mend, before the teacher is loaded where that is
    possible.
    """
    out = config.out
    store = None if config.store is None else Store.open(config.store)
    with ExitStack() as stack:
        # 1. Open: begin the cache, or go on with what is there or in the store.
        parallel = config.engine.data_parallel > 1 or config.engine.workers == "ray"
        stack.enter_context(only_writer(config, parallel))
        if store is not None:
            store.bring_manifest(out)
        run = open_or_begin(config)
        missing = run.missing

        # 2. A cache with a manifest has its tokenizers and tables: the manifest comes last.
        sides = {"student": run.student}
        if not run.entry.student_tokens:
            sides["teacher"] = run.teacher
        for side, tokenizer in sides.items():
            folder = out / f"{side}_tokenizer"
            if not folder.exists():
                with new_folder(folder) as half:
                    tokenizer.backend.save_pretrained(half)
        if parallel and missing:
            run_ranks(run)

        @cache
        def engine() -> Engine:
            return stack.enter_context(closing(load_engine(run)))

        run = settle_tables(run, lambda unsettled: make_tables(unsettled, engine()), store)
        if store is not None:
            run = dataclasses.replace(run, stored=store.begin(out, run.manifest))

        # 3. Compute; after ranks nothing is left to.
        left = run.missing
        remove_leftovers([out] if config.world == 1 else [unit.path(out) for unit in left])
        if left:
            teacher = engine()
            if run.vocabulary is not None:
                teacher.use_classes(run.vocabulary.class_of)
            run_units(run, teacher, left)

        # 4. What there is now.
        ledger = settle_ledger(out, run.manifest)
        if store is not None:
            store.push(out, run.manifest, ledger)
    entries = ledger.values()
    computed = sum(unit in ledger for unit in missing)
    return CacheReport(
        folder=out,
        rows=sum(entry.rows for entry in entries),
        masked=sum(entry.masked for entry in entries),
        chunks=sum(entry.chunks for entry in entries),
        bytes=sum(entry.bytes for entry in entries),
        computed=computed,
        kept=len(ledger) - computed,
        elsewhere=len(run.manifest.units()) - len(ledger),
        counts=Counter(totals(run.data.record.sources)),
        notes=losses(run.data),
    )


@contextmanager
def only_writer(config: CacheConfig, parallel: bool = False) -> Iterator[None]:
    """Hold the cache's lock; the system drops it with the process, however that ends.

    A rank holds the lock of its rank, and whoever only starts ranks one of its own. The run of a
    whole cache holds `.lock`, and goes on only where no rank is at work.
    """
    out, what = config.out, f"the cache {config.out}"
    name = f"{config.rank}-of-{config.world}"
    with ExitStack() as held:
        if parallel:
            held.enter_context(hold(out / f".lock-start-{name}", f"rank {name} of {what}"))
        elif config.world > 1:
            held.enter_context(hold(out / f".lock-{name}", f"rank {name} of {what}"))
            with hold(out / ".lock", what, wait=True):
                pass  # nobody has the whole of it
        else:
            held.enter_context(hold(out / ".lock", what))
            for rank in out.glob(".lock-[0-9]*-of-*[0-9]"):
                with hold(rank, what):
                    pass
        yield
