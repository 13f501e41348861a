"""Is a cache whole and sound? Every shard is opened: checksums, schema, counts, order, finite values, and who it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from shared.errors import TideError
from shared.manifest import Manifest, load_manifest
from shared.shards import finished_units, read_table, shard_counts

_FLOATS = ("t", "gold_logit", "logsumexp", "topk_logp", "chunk_logp")


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
    """Read every shard of the cache at `folder`. TideError where its manifest cannot be read."""
    manifest = load_manifest(folder)
    units = finished_units(folder)
    expected = set(manifest.units())
    problems = [
        Problem(f"{unit.path(folder)} is no part of a cache of {manifest.draws} draws and {manifest.parts} parts")
        for unit in units
        if unit not in expected
    ]
    rows = 0
    for unit in tqdm(units, unit="shard", desc="check", leave=False):
        path = unit.path(folder)
        try:
            rows += shard_counts(path, manifest.digest)["rows"]
            found = [Problem(f"{path}: {text}", path) for text in _content_problems(read_table(path), manifest)]
        except TideError as error:
            found = [Problem(error.what, path)]
        problems += found
    return CheckReport(len(units), rows, len(expected - set(units)), problems)


def _content_problems(table: pa.Table, manifest: Manifest) -> Iterator[str]:
    for name in _FLOATS:
        column = table.column(name).combine_chunks()
        values = column.values if pa.types.is_list(column.type) else column
        bad = int((~np.isfinite(values.to_numpy(zero_copy_only=False))).sum())
        if bad:
            yield f"{bad} values of {name} are not finite"
    wanted = {"topk_logp": "topk" in manifest.signals, "chunk_logp": "chunks" in manifest.signals}
    for name, present in wanted.items():
        if (table.column(name).null_count == 0) != present and table.num_rows:
            yield f"{name} is {'missing' if present else 'there'}, unlike the manifest says"
    read = _lengths(table, "split")
    temperatures = len(manifest.temperatures)
    if not np.array_equal(_lengths(table, "logsumexp"), read * temperatures):
        yield f"logsumexp does not hold {temperatures} values a position"
    if wanted["topk_logp"] and not np.array_equal(_sums(table, "topk_sizes"), _lengths(table, "topk_ids")):
        yield "topk_sizes and topk_ids do not fit"
    if len(set(table.column("example_id").to_pylist())) != table.num_rows:
        yield "an example stands in it twice"


def _lengths(table: pa.Table, name: str) -> np.ndarray:
    column = table.column(name).combine_chunks()
    return np.diff(column.offsets.to_numpy()) if len(column) else np.zeros(0, np.int64)


def _sums(table: pa.Table, name: str) -> np.ndarray:
    column = table.column(name).combine_chunks()
    ends = np.concatenate([[0], np.cumsum(column.values.to_numpy())])
    return np.diff(ends[column.offsets.to_numpy()]) if len(column) else np.zeros(0, np.int64)


def delete_damaged(report: CheckReport) -> int:
    """Delete the shards that have a problem, so that `tide cache` computes them again; how many there were."""
    damaged = {problem.path for problem in report.problems if problem.path is not None}
    for path in damaged:
        path.unlink(missing_ok=True)
    return len(damaged)
