"""The tables are made once for a cache, by whoever comes first; every other process reads them."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable

from shared.cache.manifest import MANIFEST, load_manifest
from shared.cache.stores import Store
from shared.cache.vocabulary import (
    TABLES,
    has_tables,
    load_centroids,
    load_pilot,
    load_vocabulary,
    save_tables,
)
from shared.system.errors import TideError
from shared.system.locks import hold
from teacher_cache.run.plan import CachePlan

_LOOK_SECONDS, _SAY_SECONDS = 1.0, 60.0


def settle_tables(
    plan: CachePlan, make: Callable[[CachePlan], None], store: Store | None = None
) -> CachePlan:
    """The plan with its tables, which `make` writes where nobody has; its manifest is then complete and written.

    Ranks that share a folder take turns by a lock. Where they share only a store, rank 0 makes the tables and the
    others wait for them.
    """
    config = plan.config
    if plan.wants_tables and not has_tables(config.out):
        if store is not None and config.rank > 0:
            _await(plan, store)
        else:
            _once(plan, make)
    plan = with_tables(plan)
    plan.manifest.save(config.out)
    return plan


def with_tables(plan: CachePlan) -> CachePlan:
    """The plan with the tables that lie in its folder. TideError where they are not those of its manifest."""
    if not plan.wants_tables:
        return plan
    begun = (plan.config.out / MANIFEST).exists()
    expected = load_manifest(plan.config.out).fingerprint.tables if begun else None
    vocabulary = load_vocabulary(plan.config.out, expected)
    fingerprint = dataclasses.replace(plan.manifest.fingerprint, tables=vocabulary.digest)
    return dataclasses.replace(
        plan,
        manifest=dataclasses.replace(plan.manifest, fingerprint=fingerprint),
        vocabulary=vocabulary,
    )


def _once(plan: CachePlan, make: Callable[[CachePlan], None]) -> None:
    """Hold the lock of the tables, which the system drops with the process, and make them where they are not there."""
    out = plan.config.out
    with hold(out / ".lock-tables", f"the tables of {out}", wait=True):
        if has_tables(out):
            return
        other = plan.config.targets.tables_from
        if other is None:
            make(plan)
            return
        theirs, ours = load_manifest(other).fingerprint, plan.manifest.fingerprint
        settings = ("k", "mass", "temperatures", "classes", "classes_from", "pilot")
        wrong = [n for n in settings if getattr(theirs.targets, n) != getattr(ours.targets, n)]
        if wrong or theirs.teacher != ours.teacher:
            raise TideError(
                f"the tables of {other} belong to other settings: {', '.join(wrong) or 'another teacher'}",
                expected="a cache of the same teacher with the same targets",
                fix="leave out targets.tables_from, or use the same settings",
            )
        save_tables(
            out / TABLES,
            load_vocabulary(other, theirs.tables),
            load_pilot(other),
            load_centroids(other),
        )


def _await(plan: CachePlan, store: Store) -> None:
    """Until rank 0's tables are in the store, or in the folder."""
    said = time.monotonic()
    while not has_tables(plan.config.out):
        store.bring_tables(plan.config.out)
        if has_tables(plan.config.out):
            return
        if time.monotonic() - said > _SAY_SECONDS:
            print(
                f"rank {plan.config.rank} waits for the tables that rank 0 makes", file=sys.stderr
            )
            said = time.monotonic()
        time.sleep(_LOOK_SECONDS)
