"""Parquet shards: `draw=00/part-00000.parquet`, each whole or absent, readable by any Parquet library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.atomic import write_atomically
from shared.errors import TideError
from shared.schema import SCHEMA, CacheRow, from_table, to_table

_COUNTS_KEY = b"tide.counts"
CACHE = "cache"
"""Among the counts: the digest of the manifest that a shard belongs to."""
_ZSTD_LEVEL = 9
_ROWS_PER_GROUP = 64
"""Few, so that the dictionary of a group's token ids stays small and its indices short."""

# Parquet's own encodings, by what a column holds (docs/cache-format.md has what each buys).
_BY_DICTIONARY = ("example_id", "topk_ids.list.element", "student_ids.list.element", "teacher_ids.list.element")
_ENCODINGS = {
    **{f"{name}.list.element": "DELTA_BINARY_PACKED"
       for name in ("spans", "masked", "teacher_masked", "topk_sizes", "chunk_student", "chunk_teacher")},
    **{f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in ("gold_logit", "logsumexp", "topk_logp", "chunk_logp")},
}  # fmt: skip
WRITE_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": _ZSTD_LEVEL,
    "use_dictionary": list(_BY_DICTIONARY),
    "column_encoding": _ENCODINGS,
    "row_group_size": _ROWS_PER_GROUP,
}
"""For `pyarrow.parquet.write_table`."""


@dataclass(frozen=True, order=True)
class Unit:
    """A unit of work and of storage: one part of the data at one draw."""

    draw: int
    part: int

    def path(self, cache: Path) -> Path:
        """Where the shard of this unit lies."""
        return cache / f"draw={self.draw:02d}" / f"part-{self.part:05d}.parquet"


def write_shard(path: Path, rows: list[CacheRow], temperatures: Sequence[float], counts: dict[str, Any]) -> None:
    """Write rows with their counts, atomically. The bytes depend on the content alone."""
    write_table(path, to_table(rows, temperatures), counts)


def write_table(path: Path, table: pa.Table, counts: dict[str, Any]) -> None:
    """`write_shard` for a table of the schema."""
    # A table that was read names the items of its lists in another way: the schema is always our own.
    schema = SCHEMA.with_metadata({_COUNTS_KEY: json.dumps(counts, sort_keys=True).encode()})
    table = pa.Table.from_arrays(table.columns, schema=schema)

    def write(handle: Any) -> None:
        pq.write_table(table, handle, write_page_checksum=True, **WRITE_OPTIONS)

    write_atomically(path, write)


def _unreadable(path: Path, error: Exception) -> TideError:
    return TideError(
        f"shard {path} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}",
        expected="a whole Parquet file written by `tide cache`",
        fix="delete this file and run the same `tide cache` command again: it computes the missing shard only",
    )


def open_shard(path: Path) -> pq.ParquetFile:
    """Open a shard and check its schema. TideError where it is truncated, no Parquet, or of another layout."""
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        schema = file.schema_arrow
    except Exception as error:  # a footer with a flipped bit leads the library anywhere
        raise _unreadable(path, error) from error
    if not schema.equals(SCHEMA, check_metadata=False):
        raise TideError(f"shard {path} has other columns than this version writes", fix="build the cache again")
    return file


def shard_counts(path: Path, cache: str | None = None) -> dict[str, Any]:
    """The counts that were stored with the shard, and its number of `rows`.

    `cache`: the digest of the manifest that it must belong to.
    """
    counts = _counts_in(open_shard(path), path)
    if cache is not None and counts.get(CACHE) != cache:
        raise TideError(
            f"shard {path} belongs to another cache ({counts.get(CACHE)})",
            expected=f"a shard of the cache {cache}, whose folder it lies in",
            fix="delete this file and run the same `tide cache` command again: it computes the missing shard only",
        )
    return counts


def _counts_in(file: pq.ParquetFile, path: Path) -> dict[str, Any]:
    metadata = file.schema_arrow.metadata or {}
    try:
        return {**json.loads(metadata.get(_COUNTS_KEY, b"{}")), "rows": file.metadata.num_rows}
    except ValueError as error:
        raise _unreadable(path, error) from error


def read_shard(path: Path, temperatures: Sequence[float]) -> list[CacheRow]:
    """All rows of a shard. TideError where a checksum or a count does not hold."""
    table = read_table(path)
    try:
        return from_table(table, temperatures)
    except (IndexError, ValueError) as error:
        raise _unreadable(path, error) from error


def read_table(path: Path) -> pa.Table:
    """A shard as an Arrow table. TideError where a page's checksum does not hold, or a count that it carries."""
    file = open_shard(path)
    try:
        table = file.read()
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    _check_counts(table, _counts_in(file, path), path)
    return table


def _check_counts(table: pa.Table, counts: dict[str, Any], path: Path) -> None:
    """Pages carry checksums and the footer does not: what it says must fit what the pages hold."""
    found = {"rows": table.num_rows}
    found |= {name: sum(len(chunk.values) for chunk in table.column(column).chunks)
              for name, column in (("masked", "masked"), ("chunks", "chunk_logp"))}  # fmt: skip
    wrong = {name: n for name, n in found.items() if name in counts and counts[name] != n}
    draw = path.parent.name.removeprefix("draw=")
    if draw.isdigit() and any(value != int(draw) for value in table.column("draw").unique().to_pylist()):
        wrong["draw"] = int(draw)
    if wrong:
        raise _unreadable(path, ValueError(f"it holds {wrong}, its footer or its folder says otherwise"))


def finished_units(cache: Path) -> list[Unit]:
    """Units whose shards exist, in order."""
    found = []
    for path in cache.glob("draw=*/part-*.parquet"):
        draw, part = path.parent.name.removeprefix("draw="), path.stem.removeprefix("part-")
        if draw.isdigit() and part.isdigit():
            found.append(Unit(int(draw), int(part)))
    return sorted(found)
