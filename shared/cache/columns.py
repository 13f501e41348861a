"""Rows of a cache as columns of Parquet, and back (docs/cache-format.md).

A column is flat: the arrays of all rows one after the other, and where each row's begins. Names
that end in `_q` hold integers, rounded as `shared.cache.levels` says; with `targets.values =
"float32"` the same quantities stand there exactly, under the name without `_q`. Ids of a top-k
stand by their rank in the cache's vocabulary.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from shared.cache.levels import (
    GOLD_STEPS,
    LARGEST_ODDS,
    LOGIT_STEPS,
    ODDS_STEPS,
    falls_of,
    grid,
    level_table,
    levels_of,
    to_class_levels,
    to_levels,
)
from shared.cache.row import CacheRow, Layout

_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
_COLUMNS = {
    # name: (type, type of its levels where it is rounded, may be null)
    "example_id": (pa.string(), None, False),
    "label": (pa.string(), None, False),
    "draw": (pa.int32(), None, False),
    "t": (pa.float32(), None, False),
    "student_ids": (_INTS, None, False),
    "spans": (_INTS, None, False),
    "masked": (_INTS, None, False),
    "read": (_INTS, None, True),
    "teacher_ids": (_INTS, None, True),
    "teacher_masked": (_INTS, None, True),
    "split": (pa.list_(pa.bool_()), None, False),
    "gold_logp": (_FLOATS, pa.list_(pa.int32()), False),
    "logsumexp": (_FLOATS, pa.list_(pa.int32()), False),
    "topk_sizes": (_INTS, None, True),
    "topk_ranks": (_INTS, None, True),
    "topk_logp": (_FLOATS, pa.list_(pa.uint16()), True),
    "tail_odds": (_FLOATS, pa.list_(pa.int16()), True),
    "class_mass": (_FLOATS, pa.list_(pa.uint8()), True),
    "chunk_student": (_INTS, None, True),
    "chunk_teacher": (_INTS, None, True),
    "chunk_logp": (_FLOATS, None, True),
}


def column_name(name: str, layout: Layout) -> str:
    """The column that holds a quantity."""
    rounded = layout.values == "levels" and _COLUMNS[name][1] is not None
    return f"{name}_q" if rounded else name


def schema_for(layout: Layout) -> pa.Schema:
    """The columns of a shard, in order."""
    fields = []
    for name, (exact, levels, nullable) in _COLUMNS.items():
        if name == "read" and not layout.partial:
            continue
        column = column_name(name, layout)
        fields.append(pa.field(column, exact if column == name else levels, nullable=nullable))
    return pa.schema(fields)


def to_table(rows: list[CacheRow], layout: Layout) -> pa.Table:
    """Rows as an Arrow table."""
    schema = schema_for(layout)
    lists = [row.topk_sizes for row in rows if row.topk_sizes is not None]
    topk_sizes = np.concatenate([np.zeros(0, np.int32), *lists])  # of all rows
    columns = []
    for field in schema:
        name = field.name.removesuffix("_q")
        values = [getattr(row, "topk_ids" if name == "topk_ranks" else name) for row in rows]
        if not pa.types.is_list(field.type):
            columns.append(pa.array(values, type=field.type))
            continue
        # 1. the arrays of all rows one after the other, and where each begins
        present = [v.reshape(-1) for v in values if v is not None]
        flat = np.concatenate(present) if present else np.zeros(0, np.int32)
        ends = np.cumsum([0, *(0 if v is None else v.size for v in values)])
        # 2. as they are stored
        if present:
            flat = _stored(name, flat, topk_sizes, layout)
        # 3. an Arrow list a row, null where the row has none
        missing = pa.array([v is None for v in values], pa.bool_())
        content = pa.array(flat).cast(field.type.value_type)
        offsets = pa.array(ends.astype(np.int32))
        columns.append(pa.ListArray.from_arrays(offsets, content, type=field.type, mask=missing))
    return pa.Table.from_arrays(columns, schema=schema)


def from_table(table: pa.Table, layout: Layout) -> list[CacheRow]:
    """The inverse of `to_table`, but for what is rounded; `class_mass` comes as it is stored."""
    topk = table.column("topk_sizes").combine_chunks()
    topk_sizes = topk.values.to_numpy() if len(topk) else np.zeros(0, np.int32)  # of all rows
    temperatures = len(layout.temperatures)
    shapes = {
        **dict.fromkeys(("spans", "chunk_student", "chunk_teacher"), (-1, 2)),
        "tail_odds": (-1, temperatures),
        "class_mass": (-1, temperatures, layout.classes),
    }
    cells: dict[str, list[Any]] = {}  # the rows' values, by the field of `CacheRow`
    for field in schema_for(layout):
        name = field.name.removesuffix("_q")
        target = "topk_ids" if name == "topk_ranks" else name
        column = table.column(field.name).combine_chunks()
        if not pa.types.is_list(field.type):
            cells[target] = column.to_pylist()
            continue
        if column.null_count == len(column):
            cells[target] = [None] * len(column)
            continue
        # 1. the numbers of all rows, from what is stored
        flat = column.values.to_numpy(zero_copy_only=False)
        flat = _restored(name, flat, topk_sizes, layout)
        # 2. cut into rows
        ends = column.offsets.to_numpy().tolist()
        present = column.is_valid().to_numpy(zero_copy_only=False)
        arrays: list[np.ndarray | None] = []
        for start, end, there in zip(ends[:-1], ends[1:], present, strict=True):
            arrays.append(flat[start:end] if there else None)
        # 3. in the shape of the row's field
        if name in shapes:
            arrays = [None if array is None else array.reshape(shapes[name]) for array in arrays]
        cells[target] = arrays
    return [
        CacheRow(**dict(zip(cells, row, strict=True))) for row in zip(*cells.values(), strict=True)
    ]


def _stored(name: str, values: np.ndarray, topk_sizes: np.ndarray, layout: Layout) -> np.ndarray:
    """The numbers of a whole column as they stand in the file."""
    if name == "topk_ranks" and layout.vocabulary is not None:
        return layout.vocabulary.rank_of[values]
    if layout.values == "float32":
        return values
    match name:
        case "gold_logp":
            return grid(-values, GOLD_STEPS)
        case "logsumexp":
            return grid(values, LOGIT_STEPS)
        case "tail_odds":
            return grid(np.clip(values, -LARGEST_ODDS, LARGEST_ODDS), ODDS_STEPS)
        case "topk_logp":
            levels = to_levels(values, layout.temperatures)
            return falls_of(levels, topk_sizes, layout.temperatures)
        case "class_mass" if values.dtype != np.uint8:
            return to_class_levels(values)
    return values


def _restored(name: str, stored: np.ndarray, topk_sizes: np.ndarray, layout: Layout) -> np.ndarray:
    """The inverse of `_stored`, but for `class_mass`, which training reads as levels."""
    if name == "topk_ranks" and layout.vocabulary is not None:
        return layout.vocabulary.ids_by_rank.take(stored)
    if layout.values == "float32":
        return stored
    match name:
        case "gold_logp":
            return stored.astype(np.float32) * np.float32(-1 / GOLD_STEPS)
        case "logsumexp":
            return stored.astype(np.float32) * np.float32(1 / LOGIT_STEPS)
        case "tail_odds":
            return stored.astype(np.float32) * np.float32(1 / ODDS_STEPS)
        case "topk_logp":
            levels = levels_of(stored, topk_sizes, layout.temperatures)
            return level_table(layout.temperatures).take(levels)
    return stored
