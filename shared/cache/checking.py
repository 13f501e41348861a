"""Every shard of a cache looked at, in several processes: bytes against the ledger, values against the rules."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from shared.cache.ledger import LEDGER, Entry, Ledger
from shared.cache.manifest import Manifest
from shared.cache.row import Layout
from shared.cache.shards import Unit, read_table, refuse_other_cache
from shared.cache.value_checks import RULES, problems_in
from shared.system.atomic import write_bytes
from shared.system.errors import TideError
from shared.system.signals import serve_parent

CHECKED = "checked.json"
_SHARDS_A_PROCESS = 64
_HASHED_AT_ONCE = 4_000_000_000
"""Bytes of a cache that is hashed whole before each training."""
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Finding:
    """One shard: its rows, and what is wrong with it."""

    unit: Unit
    rows: int
    problems: tuple[str, ...]


def inspect_shard(
    cache: Path, manifest: Manifest, layout: Layout, job: tuple[Unit, Entry | None]
) -> Finding:
    """Look at one shard. Damage is a finding, not an error."""
    unit, entry = job
    path = unit.path(cache)
    try:
        content = path.read_bytes()
        if entry is not None:
            entry.check(path, content)
        shard = read_table(path, layout, content)
        refuse_other_cache(path, shard.counts, manifest.digest)
        return Finding(
            unit, shard.counts["rows"], tuple(problems_in(shard.table, layout, manifest))
        )
    except TideError as error:
        return Finding(unit, 0, (error.what,))
    except (OSError, ValueError, IndexError) as error:
        return Finding(unit, 0, (f"shard {path} cannot be read: {error}",))


def in_processes(work: Callable[[T], R], jobs: Sequence[T], word: str) -> Iterator[R]:
    """`work` on every job, in their order: here where they are few, else one process a core."""
    count = min(os.cpu_count() or 1, -(-len(jobs) // _SHARDS_A_PROCESS))
    with tqdm(total=len(jobs), unit="shard", desc=word, leave=False) as bar:
        if count <= 1:
            for job in jobs:
                yield work(job)
                bar.update()
            return
        with ProcessPoolExecutor(
            count, multiprocessing.get_context("spawn"), serve_parent, (os.getpid(),)
        ) as pool:
            for found in pool.map(work, jobs, chunksize=4):
                yield found
                bar.update()


def check_shards(
    cache: Path, manifest: Manifest, layout: Layout, ledger: Ledger, units: Sequence[Unit]
) -> Iterator[Finding]:
    """What is found in each shard."""
    return in_processes(
        partial(inspect_shard, cache, manifest, layout),
        [(unit, ledger.get(unit)) for unit in units],
        "check",
    )


def passed(cache: Path) -> bool:
    """Whether this very ledger passed before, under these very rules."""
    try:
        known = json.loads((cache / CHECKED).read_text())
        ledger = hashlib.sha256((cache / LEDGER).read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False
    return known == {"ledger": ledger, "rules": RULES}


def remember(cache: Path) -> None:
    """Note that the cache passed: as long as its ledger stays, its shards are what they were."""
    ledger = hashlib.sha256((cache / LEDGER).read_bytes()).hexdigest()
    try:
        write_bytes(cache / CHECKED, json.dumps({"ledger": ledger, "rules": RULES}).encode())
    except (TideError, OSError):
        return  # a cache that cannot be written to is looked at every time


def refuse_unsound(cache: Path, manifest: Manifest, layout: Layout, ledger: Ledger) -> None:
    """TideError where a shard of a finished cache cannot be trained on.

    Values that passed once are not looked at again: then the bytes must be those of the ledger, or, of a large cache,
    their number (each shard's hash is compared when it is read).
    """
    known = passed(cache)
    if known:
        whole = sum(entry.bytes for entry in ledger.values()) <= _HASHED_AT_ONCE
        jobs = [(unit, ledger[unit]) for unit in manifest.units()]
        with ThreadPoolExecutor(
            os.cpu_count() or 1
        ) as pool:  # hashing and reading leave the interpreter to others
            checks = pool.map(partial(_same_bytes, cache, whole), jobs)
            shown = tqdm(checks, total=len(jobs), unit="shard", desc="hash", leave=False, delay=2)
            bad = [found for found in shown if found.problems]
    else:
        bad = [
            found
            for found in check_shards(cache, manifest, layout, ledger, manifest.units())
            if found.problems
        ]
    if bad:
        first = bad[0]
        raise TideError(
            f"{len(bad)} of {len(manifest.units())} shards of {cache} do not hold; {first.unit.path(cache)}: "
            + "; ".join(first.problems),
            expected="shards as `tide cache` writes them",
            fix=f"`tide verify --cache {cache} --rows 0` lists all, with --delete-damaged they are removed; the same "
            "`tide cache` command then computes them again",
        )
    if not known:
        remember(cache)


def _same_bytes(cache: Path, whole: bool, job: tuple[Unit, Entry]) -> Finding:
    """Whether a shard is still what the ledger says, by its bytes or their number."""
    unit, entry = job
    path = unit.path(cache)
    try:
        if whole:
            entry.check(path, path.read_bytes())
        elif path.stat().st_size != entry.bytes:
            return Finding(
                unit, 0, (f"{path} has {path.stat().st_size:,} bytes instead of {entry.bytes:,}",)
            )
    except TideError as error:
        return Finding(unit, 0, (error.what,))
    return Finding(unit, entry.rows, ())
