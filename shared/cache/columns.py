"""Rows of a cache as columns of Parquet, and back (docs/cache-format.md).

Columns that end in `_q` hold integers, as `shared.cache.levels` rounds; with `targets.values = "float32"` the same
quantities stand there exactly, under the name without `_q`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from shared.cache.levels import (
    GOLD_STEPS,
    LARGEST_ODDS,
    LOGIT_STEPS,
    ODDS_STEPS,
    grid,
    level_table,
    to_class_levels,
    to_levels,
    top_levels,
)
from shared.cache.row import CacheRow, Layout

_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
_SMALL = {
    "gold_logp": pa.int32(),
    "logsumexp": pa.int32(),
    "topk_logp": pa.uint16(),
    "tail_odds": pa.int16(),
    "class_mass": pa.uint8(),
}
"""Columns that are rounded, and the integers that they are rounded to."""
_NULLABLE = {"read", "teacher_ids", "teacher_masked", "topk_sizes", "topk_ranks", "topk_logp", "tail_odds",
             "class_mass", "chunk_student", "chunk_teacher", "chunk_logp"}  # fmt: skip
_PAIRS = ("spans", "chunk_student", "chunk_teacher")


def schema_for(layout: Layout) -> pa.Schema:
    """The columns of a shard, in order."""
    kinds: dict[str, pa.DataType] = {
        "example_id": pa.string(),
        "label": pa.string(),
        "draw": pa.int32(),
        "t": pa.float32(),
        **dict.fromkeys(("student_ids", "spans", "masked"), _INTS),
        **({"read": _INTS} if layout.partial else {}),
        **dict.fromkeys(("teacher_ids", "teacher_masked"), _INTS),
        "split": pa.list_(pa.bool_()),
        "gold_logp": _FLOATS,
        "logsumexp": _FLOATS,
        "topk_sizes": _INTS,
        "topk_ranks": _INTS,
        "topk_logp": _FLOATS,
        "tail_odds": _FLOATS,
        "class_mass": _FLOATS,
        "chunk_student": _INTS,
        "chunk_teacher": _INTS,
        "chunk_logp": _FLOATS,
    }
    small = layout.values == "levels"
    return pa.schema([
        pa.field(column_name(name, layout), pa.list_(_SMALL[name]) if small and name in _SMALL else kind,
                 nullable=name in _NULLABLE)
        for name, kind in kinds.items()
    ])  # fmt: skip


def column_name(name: str, layout: Layout) -> str:
    """The column that holds a quantity."""
    return f"{name}_q" if layout.values == "levels" and name in _SMALL else name


def to_table(rows: list[CacheRow], layout: Layout) -> pa.Table:
    """Rows as an Arrow table."""
    columns = []
    for field in schema_for(layout):
        name = field.name.removesuffix("_q")
        if not pa.types.is_list(field.type):
            columns.append(pa.array([getattr(row, name) for row in rows], type=field.type))
            continue
        columns.append(_list_column([_encoded(row, name, layout) for row in rows], field.type))
    return pa.Table.from_arrays(columns, schema=schema_for(layout))


def _encoded(row: CacheRow, name: str, layout: Layout) -> np.ndarray | None:
    """The numbers that stand in column `name` of a row."""
    if name == "topk_ranks":
        return (
            None
            if row.topk_ids is None or layout.vocabulary is None
            else layout.vocabulary.rank_of[row.topk_ids]
        )
    values = getattr(row, name)
    if layout.values == "float32" or values is None:
        return values
    match name:
        case "gold_logp":
            return grid(-values, GOLD_STEPS)
        case "logsumexp":
            return grid(values, LOGIT_STEPS)
        case "topk_logp":
            return _falls(
                to_levels(values, layout.temperatures),
                row.topk_sizes,
                top_levels(layout.temperatures),
            )
        case "tail_odds":
            return grid(np.clip(values, -LARGEST_ODDS, LARGEST_ODDS), ODDS_STEPS)
        case "class_mass":
            return values if values.dtype == np.uint8 else to_class_levels(values)
    return values


def _falls(levels: np.ndarray, sizes: np.ndarray | None, highest: int) -> np.ndarray:
    """By how much each level of a list is below the one before it, the first below the highest."""
    before = np.concatenate([[highest], levels[:-1]])
    assert sizes is not None
    starts = (np.cumsum(sizes) - sizes)[sizes > 0]
    before[starts] = highest
    return (before - levels)[: levels.size]


def _list_column(values: list[np.ndarray | None], kind: pa.ListType) -> pa.Array:
    sizes = np.array([0 if v is None else v.size for v in values], np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]).astype(np.int32)
    flat = [v.reshape(-1) for v in values if v is not None]
    content = pa.array(np.concatenate(flat) if flat else np.zeros(0, np.int32)).cast(
        kind.value_type
    )
    missing = pa.array([v is None for v in values], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), content, type=kind, mask=missing)


def from_table(table: pa.Table, layout: Layout) -> list[CacheRow]:
    """The inverse of `to_table`, but for what is rounded; `class_mass` comes as it is stored."""
    kept = table.column("topk_sizes").combine_chunks()
    sizes = kept.values.to_numpy() if len(kept) else np.zeros(0, np.int32)
    columns = {
        field.name.removesuffix("_q"): table.column(field.name).combine_chunks()
        for field in schema_for(layout)
    }
    cells = [_unpack(column, _decoder(name, layout, sizes)) for name, column in columns.items()]
    names = ["topk_ids" if name == "topk_ranks" else name for name in columns]
    shapes: dict[str, tuple[int, int]] = dict.fromkeys(_PAIRS, (-1, 2))
    shapes["tail_odds"] = (-1, len(layout.temperatures))
    rows = []
    for values in zip(*cells, strict=True):
        found: dict[str, Any] = dict(zip(names, values, strict=True))
        for name, shape in shapes.items():
            if found[name] is not None:
                found[name] = found[name].reshape(shape)
        if found["class_mass"] is not None:
            found["class_mass"] = found["class_mass"].reshape(
                -1, len(layout.temperatures), layout.classes
            )
        rows.append(CacheRow(**found))
    return rows


def _decoder(name: str, layout: Layout, sizes: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """From the numbers of a whole column to those of `CacheRow`."""
    if name == "topk_ranks" and layout.vocabulary is not None:
        return layout.vocabulary.ids_by_rank.take
    if layout.values == "float32":
        return _same
    match name:
        case "gold_logp":
            return lambda q: q.astype(np.float32) * np.float32(-1 / GOLD_STEPS)
        case "logsumexp":
            return lambda q: q.astype(np.float32) * np.float32(1 / LOGIT_STEPS)
        case "tail_odds":
            return lambda q: q.astype(np.float32) * np.float32(1 / ODDS_STEPS)
        case "topk_logp":
            return lambda q: level_table(layout.temperatures).take(
                levels_of(q, sizes, layout.temperatures)
            )
    return _same


def _same(values: np.ndarray) -> np.ndarray:
    return values


def levels_of(falls: np.ndarray, sizes: np.ndarray, temperatures: tuple[float, ...]) -> np.ndarray:
    """The levels of a column `topk_logp_q`, whose lists have these sizes."""
    below = np.cumsum(falls, dtype=np.int32)
    starts = np.cumsum(sizes) - sizes
    before = np.concatenate([[0], below])[starts].astype(np.int32)
    below -= np.repeat(before, sizes)
    return np.subtract(top_levels(temperatures), below, out=below)


def _unpack(column: pa.Array, decode: Callable[[np.ndarray], np.ndarray]) -> list:
    if not pa.types.is_list(column.type):
        return column.to_pylist()
    flat = column.values.to_numpy(zero_copy_only=False)
    flat = decode(flat)
    offsets = column.offsets.to_numpy().tolist()
    if column.null_count == len(column):
        return [None] * len(column)
    present = column.is_valid().to_numpy(zero_copy_only=False)
    return [
        flat[a:b] if ok else None
        for a, b, ok in zip(offsets[:-1], offsets[1:], present, strict=True)
    ]
