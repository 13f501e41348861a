"""A cache's files in plain Parquet, whole or absent.

Shards (`shards/draw=00/part-00000.parquet`) hold rows, and lie alone, so that their folder opens as
one table in any library; `tables/` is what is known of the teacher as a whole.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.cache.levels import from_table, numbers_of, schema_for, to_table
from shared.cache.row import CacheRow, Layout, Tables, TokenMap
from shared.system.files import TideError, atomic_file, refuse_odd, write_bytes

CACHE = "cache"
"""Among a shard's counts: the digest of the manifest that it belongs to."""
SHARDS, TABLES = "shards", "tables"
_COUNTS_KEY = b"tide.counts"
_UNIT = re.compile(r"shards/draw=([0-9]{2,9})/part-([0-9]{5,9})\.parquet")
_VOCABULARY, _ENCODER = "vocabulary.parquet", "encoder.parquet"
_MAP, _BYTES = "map.parquet", "bytes.parquet"  # of a teacher with a tokenizer of its own
_ENTRY = ("token", "place", "student", "share")
_MEND = "delete this file and run the same `tide cache` again: it computes the missing shard only"
_MEND_TABLES = "delete the folder `tables` and run the same `tide cache` again: it makes it anew"
# Few, so that the dictionary of a group's token ids stays small and its indices short.
_ROWS_PER_GROUP = 64
# Parquet's own encodings, by what a column holds; token ids and names go by dictionary.
_BY_DICTIONARY: Any = ["example_id", "student_ids.list.element", "teacher_ids.list.element"]
_ENCODINGS = {
    **dict.fromkeys(("spans", "masked", "read", "teacher_masked"), "DELTA_BINARY_PACKED"),
    **dict.fromkeys(("topk_sizes", "chunk_student", "chunk_teacher"), "DELTA_BINARY_PACKED"),
    **dict.fromkeys(("gold_logp", "logsumexp", "topk_ranks", "topk_logp"), "BYTE_STREAM_SPLIT"),
    **dict.fromkeys(("tail_code", "tail_level", "chunk_logp"), "BYTE_STREAM_SPLIT"),
}


@dataclass(frozen=True, order=True)
class Unit:
    """A unit of work and of storage: one part of the data at one draw."""

    draw: int
    part: int

    def path(self, cache: Path) -> Path:
        return cache / SHARDS / f"draw={self.draw:02d}" / f"part-{self.part:05d}.parquet"

    @classmethod
    def at(cls, path: Path) -> "Unit | None":
        """The unit whose shard has this name; None for any other file."""
        numbers = _UNIT.fullmatch("/".join(path.parts[-3:]))
        unit = numbers and cls(int(numbers[1]), int(numbers[2]))
        return unit if unit and unit.path(path.parent.parent.parent) == path else None


def finished_units(cache: Path) -> list[Unit]:
    """Units whose shards exist, in order."""
    units = map(Unit.at, cache.glob(f"{SHARDS}/draw=*/part-*.parquet"))
    return sorted(unit for unit in units if unit is not None)


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write `table` atomically, with a checksum a page. TideError as `atomic_file`."""
    with atomic_file(path) as handle:
        pq.write_table(table, handle, compression="zstd", write_page_checksum=True)


def read_parquet(path: Path, fix: str, content: bytes | None = None) -> pa.Table:
    """The table in a file, whose bytes may be at hand (`content`).

    TideError, with `fix`, where it is damaged.
    """
    source: Any = path if content is None else pa.BufferReader(content)
    if content is None:
        refuse_odd(path)
    try:
        return pq.ParquetFile(source, page_checksum_verification=True).read()
    except Exception as error:  # a footer with a flipped bit leads the library anywhere
        what = f"{path} cannot be read: {error!r:.300}"
        raise TideError(what, expected="a whole Parquet file", fix=fix) from error


def table_bytes(table: pa.Table, layout: Layout, counts: dict[str, Any]) -> bytes:
    """A shard's file as bytes, which depend on the content alone."""
    note = {_COUNTS_KEY: json.dumps(counts, sort_keys=True).encode()}
    schema = schema_for(layout)
    encodings, levels = {}, {}
    for field in schema:
        name = field.name.removesuffix("_q")
        column = f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        if name in _ENCODINGS:
            # A single byte split into streams is itself, and polars reads it as PLAIN alone.
            encodings[column] = "PLAIN" if field.name == "tail_code_q" else _ENCODINGS[name]
        # Split into byte streams there is nothing to match in these two: a higher level takes four
        # times as long for 2 %.
        levels[column] = 1 if name in ("topk_ranks", "topk_logp") else 9
    sink = pa.BufferOutputStream()
    pq.write_table(
        # A table that was read names the items of its lists in another way: the schema is our own.
        pa.Table.from_arrays(table.columns, schema=schema.with_metadata(note)),
        sink,
        write_page_checksum=True,
        compression="zstd",
        compression_level=levels,
        use_dictionary=_BY_DICTIONARY,
        column_encoding=encodings,
        row_group_size=_ROWS_PER_GROUP,
    )
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


def read_table(
    path: Path, layout: Layout | None = None, content: bytes | None = None, cache: str | None = None
) -> Shard:
    """Read a shard, whose bytes may be at hand (`content`).

    TideError where a page's checksum does not hold, or what it says of itself, or it has not the
    columns of `layout`, or belongs to another manifest than that of the digest `cache`.
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
    draws = []
    if unit := Unit.at(path):
        actual |= {"draw": unit.draw, "part": unit.part}
        draws = table.column("draw").unique().to_pylist() if "draw" in table.column_names else []
    try:
        counts = json.loads((table.schema.metadata or {}).get(_COUNTS_KEY, b"{}"))
        wrong = [name for name, n in actual.items() if counts.get(name, n) != n]
        wrong += [k for k, n in counts.items() if k != CACHE and (type(n) is not int or n >> 63)]
    except (ValueError, AttributeError, RecursionError) as error:
        raise TideError(f"shard {path} has a damaged footer: {error}", fix=_MEND) from error
    if any(draw != actual["draw"] for draw in draws):
        wrong.append("the column draw")
    if wrong:
        said = "its footer or its name says otherwise"
        raise TideError(f"shard {path}: {said} of {', '.join(wrong)} than it holds", fix=_MEND)
    if cache is not None and counts.get(CACHE) != cache:
        what = f"shard {path} belongs to another cache ({counts.get(CACHE)})"
        expected = f"a shard of the cache {cache}, whose folder it lies in"
        raise TideError(what, expected=expected, fix=_MEND)
    return Shard(table, {**counts, "rows": table.num_rows})


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


def save_tables(folder: Path, tables: Tables) -> None:
    """Write the tables; `vocabulary.parquet` comes last, and says that the rest is there."""

    def lists(values: np.ndarray) -> pa.ListArray:
        ends = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
        return pa.ListArray.from_arrays(pa.array(ends), pa.array(values.reshape(-1)))

    encoder: dict[str, Any] = {"scale": tables.scales, "encoder": lists(tables.encoder)}
    note = {"step": str(float(tables.step)), "center": json.dumps(tables.center.tolist())}
    write_parquet(folder / _ENCODER, pa.table(encoder).replace_schema_metadata(note))
    if (words := tables.token_map) is not None:
        entries = {name: getattr(words, name) for name in _ENTRY}
        write_parquet(folder / _MAP, pa.table(entries))
        sides = words.teacher_bytes, words.student_bytes
        ids = np.arange(max(map(len, sides)))
        padded = [pa.array(np.resize(x, ids.shape), mask=ids >= len(x)) for x in sides]
        write_parquet(folder / _BYTES, pa.table(padded, ["teacher", "student"]))
    columns = {"rank": tables.rank_of, "shared": tables.shared, "mean": tables.mean}
    columns |= {f"calibration_{i}": each for i, each in enumerate(tables.calibration)}
    columns["directions"] = lists(tables.directions)
    write_parquet(folder / _VOCABULARY, pa.table(columns))


def has_tables(cache: Path) -> bool:
    return (cache / TABLES / _VOCABULARY).exists()


def load_tables(cache: Path, digest: str | None = None) -> Tables:
    """The tables of a cache. TideError where they are damaged, or not those of `digest`."""
    folder = cache / TABLES
    words = read_parquet(folder / _VOCABULARY, _MEND_TABLES)
    encoder = read_parquet(folder / _ENCODER, _MEND_TABLES)
    token_map = None
    try:
        if (folder / _MAP).exists():
            entries = read_parquet(folder / _MAP, _MEND_TABLES)
            lengths = read_parquet(folder / _BYTES, _MEND_TABLES)
            columns = [entries.column(name).to_numpy() for name in _ENTRY]
            columns += [column.drop_null().to_numpy() for column in lengths.columns]
            token_map = TokenMap(*columns)
            for name, size in (("token", words.num_rows), ("student", len(columns[-1]))):
                ids = columns[_ENTRY.index(name)]
                if not ((ids >= 0) & (ids < size)).all():
                    raise ValueError(f"its map names a {name} that is not there")
        flat = {name: numbers_of(words.column(name).combine_chunks()) for name in words.column_names
                if name != "directions"}  # fmt: skip
        names = [name for name in flat if name.startswith("calibration_")]
        rank, note = encoder.num_rows, encoder.schema.metadata
        center = np.array(json.loads(note[b"center"]), np.float32)
        matrix = encoder.column("encoder").combine_chunks().values.to_numpy()
        directions = words.column("directions").combine_chunks().values.to_numpy()
        tables = Tables(
            rank_of=flat["rank"].astype(np.int32),
            shared=flat["shared"],
            mean=flat["mean"],
            calibration=np.stack([flat[name] for name in names]),
            directions=directions.reshape(-1, rank),
            scales=encoder.column("scale").to_numpy(),
            encoder=matrix.reshape(rank, center.size),
            center=center,
            step=float(note[b"step"]),
            token_map=token_map,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TideError(f"{folder} has other columns: {error}", fix=_MEND_TABLES) from error
    if digest is not None and tables.digest != digest:
        raise TideError(
            f"{folder} has not the tables that the shards were written with ({tables.digest})",
            expected=f"the tables that the manifest names ({digest})",
            fix=f"copy {folder} again from where the cache came from, or build it again",
        )
    return tables
