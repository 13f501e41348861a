"""Is a cache whole and sound? Every shard is opened: its bytes against the ledger, its values against the rules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared.cache.checking import CHECKED, check_shards, remember
from shared.cache.ledger import LEDGER, Ledger, load_ledger, settle_ledger
from shared.cache.manifest import Manifest, load_manifest
from shared.cache.shards import finished_units
from shared.system.errors import TideError


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `path`: the shard, where it is one that can be computed again."""

    text: str
    path: Path | None = None


@dataclass(frozen=True)
class CheckReport:
    """What was looked at, and what is wrong with it."""

    shards: int
    rows: int
    missing: int
    problems: list[Problem]


def check_cache(folder: Path) -> CheckReport:
    """Read every shard of the cache at `folder`, in several processes. A ledger that is not there is made anew.

    TideError where its manifest or its tables cannot be read.
    """
    manifest = load_manifest(folder)
    layout = manifest.layout(folder)
    ledger, problems = _ledger(folder, manifest)
    units, expected = finished_units(folder), set(manifest.units())
    problems += [
        Problem(
            f"{unit.path(folder)} is no part of a cache of {manifest.draws} draws and {manifest.parts} parts"
        )
        for unit in units
        if unit not in expected
    ]
    rows = 0
    for found in check_shards(folder, manifest, layout, ledger, units):
        path = found.unit.path(folder)
        rows += found.rows
        problems += [
            Problem(text if str(path) in text else f"{path}: {text}", path)
            for text in found.problems
        ]
    missing = len(expected - set(units))
    if not problems and not missing:
        settle_ledger(folder, manifest)
        remember(folder)
    return CheckReport(len(units), rows, missing, problems)


def _ledger(folder: Path, manifest: Manifest) -> tuple[Ledger, list[Problem]]:
    try:
        return load_ledger(folder, manifest), []
    except TideError as error:
        return {}, [Problem(error.what, folder / LEDGER)]


def delete_damaged(report: CheckReport) -> int:
    """Delete the files that have a problem, so that `tide cache` makes them again; how many there were."""
    damaged = {problem.path for problem in report.problems if problem.path is not None}
    for path in damaged:
        path.unlink(missing_ok=True)
        (path.parent.parent / CHECKED).unlink(missing_ok=True)
    return len(damaged)
