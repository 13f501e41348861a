"""Parquet shards (`draw=00/part-00000.parquet`), whole or absent, for any Parquet library."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.cache.columns import from_table, schema_for, to_table
from shared.cache.parquet import read_parquet
from shared.cache.row import CacheRow, Layout
from shared.system.errors import TideError
from shared.system.files import write_bytes

_COUNTS_KEY = b"tide.counts"
CACHE = "cache"
"""Among the counts: the digest of the manifest that a shard belongs to."""
_MEND = "delete this file and run the same `tide cache` again: it computes the missing shard only"
# Few, so that the dictionary of a group's token ids stays small and its indices short.
_ROWS_PER_GROUP = 64
# Parquet's own encodings, by what a column holds; token ids and names go by dictionary.
_BY_DICTIONARY = ["example_id", "student_ids.list.element", "teacher_ids.list.element"]
_DELTA = (
    "spans",
    "masked",
    "read",
    "teacher_masked",
    "topk_sizes",
    "chunk_student",
    "chunk_teacher",
)
_SPLIT = (
    "gold_logp", "logsumexp", "topk_ranks", "topk_logp", "tail_odds", "class_mass", "chunk_logp",
)  # fmt: skip


@dataclass(frozen=True, order=True)
class Unit:
    """A unit of work and of storage: one part of the data at one draw."""

    draw: int
    part: int

    def path(self, cache: Path) -> Path:
        """Where the shard of this unit lies."""
        return cache / f"draw={self.draw:02d}" / f"part-{self.part:05d}.parquet"

    @classmethod
    def at(cls, path: Path) -> "Unit | None":
        """The unit whose shard has this name; None for any other file."""
        numbers = (path.parent.name.removeprefix("draw="), path.stem.removeprefix("part-"))
        if not all(n.isascii() and n.isdecimal() and len(n) < 10 for n in numbers):
            return None
        unit = cls(int(numbers[0]), int(numbers[1]))
        return unit if unit.path(path.parent.parent) == path else None


def finished_units(cache: Path) -> list[Unit]:
    """Units whose shards exist, in order."""
    units = (Unit.at(path) for path in cache.glob("draw=*/part-*.parquet"))
    return sorted(unit for unit in units if unit is not None)


def write_options(layout: Layout) -> dict[str, Any]:
    """For `pyarrow.parquet.write_table`."""
    encodings, levels = {}, {}
    for field in schema_for(layout):
        name = field.name.removesuffix("_q")
        column = f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        if name in _DELTA:
            encodings[column] = "DELTA_BINARY_PACKED"
        elif name in _SPLIT:
            encodings[column] = "BYTE_STREAM_SPLIT"
        # Split into byte streams there is nothing to match in these two: a higher level takes four
        # times as long for 2 %.
        levels[column] = 1 if name in ("topk_ranks", "topk_logp") else 9
    return {
        "compression": "zstd",
        "compression_level": levels,
        "use_dictionary": _BY_DICTIONARY,
        "column_encoding": encodings,
        "row_group_size": _ROWS_PER_GROUP,
    }


def table_bytes(table: pa.Table, layout: Layout, counts: dict[str, Any]) -> bytes:
    """A shard's file as bytes, which depend on the content alone."""
    note = {_COUNTS_KEY: json.dumps(counts, sort_keys=True).encode()}
    # A table that was read names the items of its lists in another way: the schema is our own.
    table = pa.Table.from_arrays(table.columns, schema=schema_for(layout).with_metadata(note))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True, **write_options(layout))
    return sink.getvalue().to_pybytes()


def write_table(path: Path, table: pa.Table, layout: Layout, counts: dict[str, Any]) -> bytes:
    """`write_shard` for a table of the layout."""
    content = table_bytes(table, layout, counts)
    write_bytes(path, content)
    return content


def write_shard(path: Path, rows: list[CacheRow], layout: Layout, counts: dict[str, Any]) -> bytes:
    """Write rows with their counts, atomically; what was written."""
    return write_table(path, to_table(rows, layout), layout, counts)


@dataclass(frozen=True)
class Shard:
    """A shard as it was read: its columns, and the counts stored with it (and its `rows`)."""

    table: pa.Table
    counts: dict[str, Any]

    def rows(
        self, path: Path, layout: Layout, chosen: Sequence[int] | None = None
    ) -> list[CacheRow]:
        """All rows, or the chosen ones. TideError, which names `path`, where they are damaged."""
        try:
            return from_table(self.table if chosen is None else self.table.take(chosen), layout)
        except (IndexError, ValueError) as error:
            raise TideError(f"shard {path} cannot be decoded: {error}", fix=_MEND) from error


def read_table(path: Path, layout: Layout | None = None, content: bytes | None = None) -> Shard:
    """Read a shard.

    TideError where a page's checksum does not hold, or what it says of itself, or its columns.

    `content`: the file's bytes, where they are at hand. With `layout` None any columns will do.
    """
    table = read_parquet(path, _MEND, content)
    if layout is not None and not table.schema.equals(schema_for(layout), check_metadata=False):
        raise TideError(f"shard {path} has other columns than this cache's", fix=_MEND)
    # Pages carry checksums and the footer does not: what it says must fit what the pages hold and
    # where the file lies.
    actual: dict[str, Any] = {"rows": table.num_rows}
    for name, column in (("masked", "masked"), ("chunks", "chunk_logp")):
        if column in table.column_names:
            actual[name] = sum(len(chunk.values) for chunk in table.column(column).chunks)
    unit = Unit.at(path)
    draws: list[int] = []
    if unit is not None:
        actual |= {"draw": unit.draw, "part": unit.part}
        draws = table.column("draw").unique().to_pylist() if "draw" in table.column_names else []
    try:
        counts = json.loads((table.schema.metadata or {}).get(_COUNTS_KEY, b"{}"))
        wrong = [name for name, n in actual.items() if counts.get(name, n) != n]
    except (ValueError, AttributeError) as error:
        raise TideError(f"shard {path} has a damaged footer: {error}", fix=_MEND) from error
    if any(draw != actual["draw"] for draw in draws):
        wrong.append("the column draw")
    if wrong:
        said = "its footer or its name says otherwise"
        raise TideError(f"shard {path}: {said} of {', '.join(wrong)} than it holds", fix=_MEND)
    return Shard(table, {**counts, "rows": table.num_rows})


def read_shard(path: Path, layout: Layout, content: bytes | None = None) -> list[CacheRow]:
    """All rows of a shard. TideError as `read_table`."""
    return read_table(path, layout, content).rows(path, layout)


def refuse_other_cache(path: Path, counts: dict[str, Any], cache: str) -> None:
    """TideError where the shard does not belong to the manifest whose digest is `cache`."""
    if counts.get(CACHE) != cache:
        raise TideError(
            f"shard {path} belongs to another cache ({counts.get(CACHE)})",
            expected=f"a shard of the cache {cache}, whose folder it lies in",
            fix=_MEND,
        )


def column_bytes(content: bytes) -> Counter[str]:
    """Compressed bytes of each column of a shard's file; `_q` is left out of their names."""
    sizes: Counter[str] = Counter()
    metadata = pq.ParquetFile(pa.BufferReader(content)).metadata
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            name = column.path_in_schema.split(".")[0].removesuffix("_q")
            sizes[name] += column.total_compressed_size
    return sizes
