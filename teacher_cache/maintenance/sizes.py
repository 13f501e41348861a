"""What each way of keeping numbers takes: one shard written several ways, in bytes a masked position by column."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from shared.cache.columns import to_table
from shared.cache.manifest import load_manifest
from shared.cache.row import CacheRow, Layout
from shared.cache.shards import finished_units, read_shard, write_options
from shared.system.errors import TideError

_SHOWN = ("topk_ranks", "topk_logp", "class_mass")


def column_bytes(source: Any) -> Counter[str]:
    """Compressed bytes of each column of a Parquet file (a path or an open file); `_q` is left out of their names."""
    sizes: Counter[str] = Counter()
    metadata = pq.ParquetFile(source).metadata
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            part = metadata.row_group(group).column(column)
            sizes[part.path_in_schema.split(".")[0].removesuffix("_q")] += (
                part.total_compressed_size
            )
    return sizes


def bytes_of(content: bytes) -> Counter[str]:
    """`column_bytes` of a file's content."""
    return column_bytes(io.BytesIO(content))


def size_steps(rows: list[CacheRow], layout: Layout) -> dict[str, Counter[str]]:
    """Bytes by column of `rows`, from plain Parquet to what is written, one step after the other."""
    done = write_options(layout)
    encodings = done["column_encoding"]
    split = {name: kind for name, kind in encodings.items() if kind == "BYTE_STREAM_SPLIT"}
    plain: dict[str, Any] = {"compression": "zstd", "compression_level": 3, "use_dictionary": False}
    grouped = {
        **plain,
        "row_group_size": done["row_group_size"],
        "use_dictionary": done["use_dictionary"],
    }
    steps: dict[str, tuple[Layout, dict[str, Any]]] = {
        "levels, ids by number, zstd 3": (_by_number(layout), plain),
        "ids by rank": (layout, grouped),
        "byte-stream split": (layout, {**grouped, "column_encoding": split}),
        "positions by delta": (layout, {**grouped, "column_encoding": encodings}),
        "zstd 9 where it pays: what is written": (layout, done),
    }
    return {name: _written(rows, *how) for name, how in steps.items()}


def _by_number(layout: Layout) -> Layout:
    """The layout in which ids stand as they are."""
    if layout.vocabulary is None:
        return layout
    same = np.arange(layout.vocabulary.rank_of.size, dtype=np.int32)
    return dataclasses.replace(
        layout, vocabulary=dataclasses.replace(layout.vocabulary, rank_of=same)
    )


def _written(rows: list[CacheRow], layout: Layout, options: dict[str, Any]) -> Counter[str]:
    file = io.BytesIO()
    known = {f"{name}.list.element" for name in to_table(rows[:1], layout).column_names}
    encoding = {k: v for k, v in options.get("column_encoding", {}).items() if k in known}
    pq.write_table(
        to_table(rows, layout),
        file,
        write_page_checksum=True,
        **{**options, "column_encoding": encoding or None},
    )
    file.seek(0)
    return column_bytes(file)


def describe_first_shard(cache: Path) -> str:
    """The steps for the first finished shard of a cache. TideError where it has none."""
    units = finished_units(cache)
    if not units:
        raise TideError(f"{cache} has no finished shard", expected="a cache from `tide cache`")
    layout = load_manifest(cache).layout(cache)
    return describe_sizes(read_shard(units[0].path(cache), layout), layout)


def describe_sizes(rows: list[CacheRow], layout: Layout) -> str:
    """The steps as a small table."""
    masked = sum(row.masked.size for row in rows)
    lines = [f"bytes a masked position, {masked:,} of them in one shard", ""]
    names = " | ".join(_SHOWN)
    lines.append(f"| step | all | {names} | the rest |\n|---|---|---|---|---|---|")
    for name, sizes in size_steps(rows, layout).items():
        cells = [sizes[column] / max(1, masked) for column in _SHOWN]
        total = sizes.total() / max(1, masked)
        shown = " | ".join(f"{cell:.1f}" for cell in cells)
        lines.append(f"| {name} | {total:.1f} | {shown} | {total - sum(cells):.1f} |")
    return "\n".join(lines)
