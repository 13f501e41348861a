"""Rows as columns of Parquet, in small integers ("levels"), and back (docs/cache-format.md).

A column is flat: the arrays of all rows one after the other, and where each row's begins. Names
that end in `_q` hold integers; with `targets.values = "float32"` the same quantities stand there
exactly, under the name without `_q`. Ids of a top-k stand by their rank in the vocabulary.

Every rounding is uniform in the quantity whose error costs the same everywhere. With p the
teacher's probability of a token and KL the divergence of what is stored from the truth, a step h in
log p costs p·h²/24. So
* a top-k probability is kept as round(N · p^a), a = 1/(2·T), for the hottest cached T: steps grow
  as p falls, and cost the same at every rank when the distribution is heated to T;
* coefficients of the tail are measured in its Fisher metric, averaged over the cached T, and have
  one step: an error h costs h²/2;
* the tail's level, by which its mass is what it was, on a grid of 1/256 nat.
"""

from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int, Integer

from shared.cache.row import CacheRow, Layout

# Levels a nat of the tail's level, the gold token's log p, and logsumexp.
TAIL_STEPS, GOLD_STEPS, LOGIT_STEPS = 256, 512, 32
LARGEST_LEVEL = 120.0  # nats, of the tail's level, up or down: below it holds nothing
LARGEST_CODE = 127  # steps of a coefficient, up or down
EMPTY = -1e30
"""Log-mass of what holds nothing. Finite: 0 · (EMPTY − EMPTY) is 0 where 0 · (−∞ + ∞) is NaN."""

_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
_COLUMNS = {
    # name: (type, type of its levels where it is rounded); the optional ones may be null
    "example_id": (pa.string(), None), "label": (pa.string(), None), "draw": (pa.int32(), None),
    "t": (pa.float32(), None), "student_ids": (_INTS, None), "spans": (_INTS, None),
    "masked": (_INTS, None), "read": (_INTS, None), "teacher_ids": (_INTS, None),
    "teacher_masked": (_INTS, None), "split": (pa.list_(pa.bool_()), None),
    "gold_logp": (_FLOATS, pa.list_(pa.int32())), "logsumexp": (_FLOATS, pa.list_(pa.int32())),
    "topk_sizes": (_INTS, None), "topk_ranks": (_INTS, None),
    "topk_logp": (_FLOATS, pa.list_(pa.uint16())), "tail_code": (_FLOATS, pa.list_(pa.binary(1))),
    "tail_level": (_FLOATS, pa.list_(pa.int16())),
    "chunk_student": (_INTS, None), "chunk_teacher": (_INTS, None), "chunk_logp": (_FLOATS, None),
}  # fmt: skip
_OPTIONAL = ("read", "teacher", "topk", "tail", "chunk")  # how their names begin
# Quantities on a uniform grid: steps a nat, and the largest that is kept.
_GRIDS = {
    "gold_logp": (-GOLD_STEPS, 1e6),
    "logsumexp": (LOGIT_STEPS, 1e6),
    "tail_level": (TAIL_STEPS, LARGEST_LEVEL),
}


def column_name(name: str, layout: Layout) -> str:
    """The column that holds a quantity."""
    rounded = layout.values == "levels" and _COLUMNS[name][1] is not None
    return f"{name}_q" if rounded else name


def schema_for(layout: Layout) -> pa.Schema:
    """The columns of a shard, in order."""
    fields = []
    for name, (exact, levels) in _COLUMNS.items():
        if name == "read" and not layout.partial:
            continue
        column = column_name(name, layout)
        kind = exact if column == name else levels
        if column == "tail_code_q" and layout.rank:  # a byte a coefficient
            kind = pa.list_(pa.binary(layout.rank))
        fields.append(pa.field(column, kind, nullable=name.startswith(_OPTIONAL)))
    return pa.schema(fields)


def to_table(rows: list[CacheRow], layout: Layout) -> pa.Table:
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
        content = None
        # 2. as they are stored
        rounded = field.name != name and len(present) > 0
        if name == "topk_ranks" and layout.tables is not None:
            flat = layout.tables.rank_of[flat]
        elif rounded and name in _GRIDS:
            steps, largest = _GRIDS[name]
            flat = np.rint(np.clip(flat, -largest, largest) * steps).astype(np.int32)
        elif rounded and name == "topk_logp":
            # by how much each level of a list is below the one before it, and the first below N
            levels = to_levels(flat, layout.temperatures)
            before = np.concatenate([[0], levels])[: levels.size]
            firsts = (np.cumsum(topk_sizes) - topk_sizes)[topk_sizes > 0]
            before[firsts] = _scale(layout.temperatures)[0]
            flat = before - levels
        elif field.name == "tail_code_q":
            ends //= max(1, layout.rank)
            bytes_of = pa.py_buffer(flat.astype(np.int8).tobytes())
            content = pa.Array.from_buffers(field.type.value_type, ends[-1], [None, bytes_of])
        # 3. an Arrow list a row, null where the row has none
        missing = pa.array([v is None for v in values], pa.bool_())
        if content is None:
            content = pa.array(flat).cast(field.type.value_type)
        offsets = pa.array(ends.astype(np.int32))
        columns.append(pa.ListArray.from_arrays(offsets, content, type=field.type, mask=missing))
    return pa.Table.from_arrays(columns, schema=schema)


def numbers_of(values: pa.Array) -> np.ndarray:
    """Arrow's numbers as numpy's; bytes of a fixed number as a row of int8 each."""
    if not pa.types.is_fixed_size_binary(values.type):
        return values.to_numpy(zero_copy_only=False)
    width = values.type.byte_width
    every = np.frombuffer(values.buffers()[1] or b"", np.int8)
    return every[values.offset * width : (values.offset + len(values)) * width].reshape(-1, width)


def from_table(table: pa.Table, layout: Layout) -> list[CacheRow]:
    """The inverse of `to_table`, but for what is rounded; `tail_code` comes as it is stored."""
    topk = table.column("topk_sizes").combine_chunks()
    topk_sizes = topk.values.to_numpy() if len(topk) else np.zeros(0, np.int32)  # of all rows
    shapes = {
        **dict.fromkeys(("spans", "chunk_student", "chunk_teacher"), (-1, 2)),
        "tail_level": (-1, len(layout.temperatures)),
        "tail_code": (-1, layout.rank),
    }
    cells: dict[str, list[Any]] = {}  # the rows' values, by the field of `CacheRow`
    for field in schema_for(layout):
        name = field.name.removesuffix("_q")
        target = "topk_ids" if name == "topk_ranks" else name
        column = table.column(field.name).combine_chunks()
        if not pa.types.is_list(field.type):
            cells[target] = column.to_pylist()
            continue
        # 1. the numbers of all rows, from what is stored
        flat = numbers_of(column.values)
        if name == "topk_ranks" and layout.tables is not None:
            flat = layout.tables.ids_by_rank.take(flat)
        elif field.name != name and name in _GRIDS:
            flat = flat.astype(np.float32) * np.float32(1 / _GRIDS[name][0])
        elif field.name != name and name == "topk_logp":
            levels = levels_of(flat, topk_sizes, layout.temperatures)
            flat = level_table(layout.temperatures).take(levels)
        # 2. cut into rows, in the shape of the row's field
        ends = column.offsets.to_numpy().tolist()
        present = column.is_valid().to_numpy(zero_copy_only=False)
        cells[target] = []
        for start, end, there in zip(ends[:-1], ends[1:], present, strict=True):
            array = flat[start:end].reshape(shapes.get(name, -1)) if there else None
            cells[target].append(array)
    rows = zip(*cells.values(), strict=True)
    return [CacheRow(**dict(zip(cells, row, strict=True))) for row in rows]


def _scale(temperatures: tuple[float, ...]) -> tuple[int, float]:
    """N, the level of p = 1 (256 where no T is above 2), and a, the power of p in equal steps."""
    hottest = max(2.0, *temperatures)
    return round(128 * hottest), 1.0 / (2.0 * hottest)


def to_levels(
    logp: Float[np.ndarray, " n"], temperatures: tuple[float, ...]
) -> Int[np.ndarray, " n"]:
    """Levels of log-probabilities: round(N · p^a), at least 1."""
    n, a = _scale(temperatures)
    return np.maximum(np.rint(n * np.exp(logp * np.float32(a))), 1).astype(np.int32)


def level_table(temperatures: tuple[float, ...]) -> Float[np.ndarray, " levels"]:
    """log p = log(level / N) / a of every level; that of 0 is never looked up."""
    n, a = _scale(temperatures)
    return (np.log(np.maximum(np.arange(n + 1), 1) / n) / a).astype(np.float32)


def half_steps(
    logp: Float[np.ndarray, "*shape"], temperatures: tuple[float, ...]
) -> Float[np.ndarray, "*shape"]:
    """By how much rounding to levels may have moved these log-probabilities, in nats."""
    n, a = _scale(temperatures)
    below = np.maximum(np.exp(a * logp.astype(np.float64)) - 0.5 / n, 1e-12)
    return logp - np.log(below) / a


def levels_of(
    falls: Integer[np.ndarray, " kept"],
    sizes: Int[np.ndarray, " lists"],
    temperatures: tuple[float, ...],
) -> Int[np.ndarray, " kept"]:
    """The inverse: levels from how each falls from the one before it in its list."""
    below = np.cumsum(falls, dtype=np.int32)
    starts = np.cumsum(sizes) - sizes
    before = np.concatenate([[0], below])[starts].astype(np.int32)
    below -= np.repeat(before, sizes)
    return np.subtract(_scale(temperatures)[0], below, out=below)
