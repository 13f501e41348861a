"""What each of Parquet's encodings buys: one shard written several ways, in bytes a masked position by column."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.errors import TideError
from shared.shards import WRITE_OPTIONS, finished_units, read_table, shard_counts


def column_bytes(source: Any) -> Counter[str]:
    """Compressed bytes of each column of a Parquet file (a path or an open file)."""
    sizes: Counter[str] = Counter()
    metadata = pq.ParquetFile(source).metadata
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            part = metadata.row_group(group).column(column)
            sizes[part.path_in_schema.split(".")[0]] += part.total_compressed_size
    return sizes


def size_steps(table: pa.Table) -> dict[str, Counter[str]]:
    """Bytes by column of `table`, from plain Parquet to what is written, one step after the other."""
    done = dict(WRITE_OPTIONS)
    encodings = done["column_encoding"]
    split = {name: kind for name, kind in encodings.items() if kind == "BYTE_STREAM_SPLIT"}
    plain: dict[str, Any] = {"compression": "zstd", "compression_level": 3, "use_dictionary": False}
    with_ids = {**plain, "use_dictionary": done["use_dictionary"], "row_group_size": done["row_group_size"]}
    steps: list[tuple[str, pa.Table, dict[str, Any]]] = [
        ("zstd 3 alone, log p as float32", _wide(table), plain),
        ("log p as rounded float16", table, plain),
        ("ids by dictionary, 64 rows a group", table, with_ids),
        ("floats by byte-stream split", table, {**with_ids, "column_encoding": split}),
        ("positions by delta", table, {**with_ids, "column_encoding": encodings}),
        ("zstd 9: what is written", table, done),
    ]
    return {name: _written(content, options) for name, content, options in steps}


def _wide(table: pa.Table) -> pa.Table:
    """The table with log p in float32, and not as many equal digits as rounding leaves."""
    place = table.schema.get_field_index("topk_logp")
    column = table.column(place).combine_chunks()
    if column.null_count == len(column):
        return table
    values = np.asarray(column.values).astype(np.float32)
    noise = np.random.default_rng(0).uniform(0, 1 / 64, values.size).astype(np.float32)
    made = pa.ListArray.from_arrays(column.offsets, pa.array(values - noise))
    return table.set_column(place, "topk_logp", made)


def _written(table: pa.Table, options: dict[str, Any]) -> Counter[str]:
    file = io.BytesIO()
    pq.write_table(table, file, write_page_checksum=True, **options)
    file.seek(0)
    return column_bytes(file)


def describe_first_shard(cache: Path) -> str:
    """The steps for the first finished shard of a cache. TideError where it has none."""
    units = finished_units(cache)
    if not units:
        raise TideError(f"{cache} has no finished shard", expected="a cache from `tide cache`")
    path = units[0].path(cache)
    return describe_sizes(read_table(path), shard_counts(path)["masked"])


def describe_sizes(table: pa.Table, masked: int) -> str:
    """The steps as a small table."""
    lines = [f"bytes a masked position, {masked:,} of them in one shard", ""]
    lines.append("| step | all | topk_ids | topk_logp | the rest |\n|---|---|---|---|---|")
    for name, sizes in size_steps(table).items():
        ids, logp, total = (x / max(1, masked) for x in (sizes["topk_ids"], sizes["topk_logp"], sizes.total()))
        lines.append(f"| {name} | {total:.1f} | {ids:.1f} | {logp:.1f} | {total - ids - logp:.1f} |")
    return "\n".join(lines)
