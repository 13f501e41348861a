"""Every shard of a cache looked at: bytes against the ledger, values against the rules."""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from shared.cache.ledger import LEDGER, Entry, Ledger
from shared.cache.manifest import Manifest
from shared.cache.row import Layout
from shared.cache.shards import Unit, read_table, refuse_other_cache
from shared.cache.value_checks import VERSION, problems_in
from shared.system.errors import TideError
from shared.system.files import write_bytes
from shared.system.processes import serve_parent

CHECKED = "checked.json"
_SHARDS_A_PROCESS = 64
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
        problems = problems_in(shard.table, layout, manifest)
        return Finding(unit, shard.counts["rows"], tuple(problems))
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
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(count, spawn, serve_parent, (os.getpid(),)) as pool:
            for result in pool.map(work, jobs, chunksize=4):
                yield result
                bar.update()


def check_shards(
    cache: Path, manifest: Manifest, layout: Layout, ledger: Ledger, units: Sequence[Unit]
) -> Iterator[Finding]:
    """What is found in each shard."""
    jobs = [(unit, ledger.get(unit)) for unit in units]
    return in_processes(partial(inspect_shard, cache, manifest, layout), jobs, "check")


def _passing(cache: Path) -> dict[str, object]:
    """What `checked.json` says of a cache that passed: this very ledger, under these very rules."""
    ledger = hashlib.sha256((cache / LEDGER).read_bytes()).hexdigest()
    return {"ledger": ledger, "rules": VERSION}


def remember(cache: Path) -> None:
    """Note that the cache passed: as long as its ledger stays, its shards are what they were."""
    try:
        write_bytes(cache / CHECKED, json.dumps(_passing(cache)).encode())
    except (TideError, OSError):
        return  # a cache that cannot be written to is looked at every time


def refuse_unsound(cache: Path, manifest: Manifest, layout: Layout, ledger: Ledger) -> None:
    """TideError where a shard of a finished cache cannot be trained on.

    Values that passed once are not looked at again: then every shard must be there in its length,
    and its hash is compared when it is read.
    """
    units = manifest.units()
    try:
        known = json.loads((cache / CHECKED).read_text()) == _passing(cache)
    except (OSError, ValueError):
        known = False
    if known:
        problem = "it is missing, or not as long as the ledger says"
        bad = [(u, problem) for u in units if _size(u.path(cache)) != ledger[u].bytes]
    else:
        checks = check_shards(cache, manifest, layout, ledger, units)
        bad = [(finding.unit, finding.problems[0]) for finding in checks if finding.problems]
    if bad:
        raise TideError(
            f"{len(bad)} of {len(units)} shards of {cache} do not hold; "
            f"{bad[0][0].path(cache)}: {bad[0][1]}",
            expected="shards as `tide cache` writes them",
            fix=f"`tide verify --cache {cache} --rows 0 --delete-damaged` lists and removes them; "
            "the same `tide cache` command then computes them again",
        )
    if not known:
        remember(cache)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
