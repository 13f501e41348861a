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
_ZSTD_LEVEL = 9
_ROWS_PER_GROUP = 64
"""Few, so that the dictionary of a group's token ids stays small and its indices short."""

# Parquet's own encodings, by what a column holds (docs/cache-format.md has what each buys).
_BY_DICTIONARY = ("example_id", "topk_ids.list.element", "student_ids.list.element", "teacher_ids.list.element")
_ENCODINGS = {
    **{f"{name}.list.element": "DELTA_BINARY_PACKED"
       for name in ("masked", "teacher_masked", "topk_sizes", "chunk_student", "chunk_teacher")},
    **{f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in ("gold_logit", "logsumexp", "topk_logp", "chunk_logp")},
}  # fmt: skip


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
    table = table.replace_schema_metadata({_COUNTS_KEY: json.dumps(counts, sort_keys=True).encode()})

    def write(handle: Any) -> None:
        pq.write_table(
            table,
            handle,
            compression="zstd",
            compression_level=_ZSTD_LEVEL,
            use_dictionary=list(_BY_DICTIONARY),  # pyright: ignore[reportArgumentType]
            column_encoding=_ENCODINGS,
            write_page_checksum=True,
            row_group_size=_ROWS_PER_GROUP,
        )

    write_atomically(path, write)


def _unreadable(path: Path, error: Exception) -> TideError:
    return TideError(
        f"shard {path} cannot be read: {str(error).splitlines()[0]}",
        expected="a whole Parquet file written by `tide cache`",
        fix="delete this file and run the same `tide cache` command again: it computes the missing shard only",
    )


def open_shard(path: Path) -> pq.ParquetFile:
    """Open a shard and check its schema. TideError where it is truncated, no Parquet, or of another layout."""
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    if not schema.equals(SCHEMA, check_metadata=False):
        raise TideError(f"shard {path} has other columns than this version writes", fix="build the cache again")
    return file


def shard_counts(path: Path) -> dict[str, Any]:
    """The counts that were stored with the shard, and its number of `rows`."""
    file = open_shard(path)
    metadata = file.schema_arrow.metadata or {}
    return {**json.loads(metadata.get(_COUNTS_KEY, b"{}")), "rows": file.metadata.num_rows}


def read_shard(path: Path, temperatures: Sequence[float]) -> list[CacheRow]:
    """All rows of a shard. TideError where a page's checksum does not hold."""
    return from_table(read_table(path), temperatures)


def read_table(path: Path) -> pa.Table:
    """A shard as an Arrow table. TideError where a page's checksum does not hold."""
    file = open_shard(path)
    try:
        return file.read()
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def finished_units(cache: Path) -> list[Unit]:
    """Units whose shards exist, in order."""
    found = []
    for path in cache.glob("draw=*/part-*.parquet"):
        draw, part = path.parent.name.removeprefix("draw="), path.stem.removeprefix("part-")
        if draw.isdigit() and part.isdigit():
            found.append(Unit(int(draw), int(part)))
    return sorted(found)
