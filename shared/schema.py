"""The cache's row: all that stage two needs of one draw of one example (DESIGN §6).

Lists are flat: `spans` and `chunk_student` hold start, end, start, end, …; `logsumexp` holds one value per position
and stored temperature, position by position; `topk_ids` and `topk_logp` hold `topk_sizes[i]` entries for position i.
docs/cache-format.md says how to read it without this package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from shared.compact import round_logp

SCHEMA_VERSION = 3

_INTS = pa.list_(pa.int32())
_FLOATS = pa.list_(pa.float32())

SCHEMA = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),  # from the content (and the occurrence of a repeat)
        pa.field("label", pa.string(), nullable=False),  # the row's own id, or empty
        pa.field("draw", pa.int32(), nullable=False),
        pa.field("t", pa.float32(), nullable=False),
        pa.field("student_ids", _INTS, nullable=False),  # x_0, filled with EOS to a whole block
        pa.field("spans", _INTS, nullable=False),  # maskable student positions: start, end, start, end, … rising
        pa.field("masked", _INTS, nullable=False),  # student positions, rising
        pa.field("teacher_ids", _INTS),  # null: the teacher reads student_ids
        pa.field("teacher_masked", _INTS),  # teacher positions, rising; null: `masked`
        pa.field(
            "split", pa.list_(pa.bool_()), nullable=False
        ),  # per teacher position: in CompDemo's part A, read in pass 2
        pa.field("gold_logit", _FLOATS, nullable=False),  # per teacher position
        pa.field("logsumexp", _FLOATS, nullable=False),  # per teacher position × temperature
        pa.field("topk_sizes", _INTS),  # per teacher position; null: signal not cached
        pa.field("topk_ids", _INTS),
        pa.field("topk_logp", pa.list_(pa.float16())),  # logit − logsumexp at T = 1, falling (`shared.compact`)
        pa.field("chunk_student", _INTS),  # active chunks: start, end in student tokens; null: not cached
        pa.field("chunk_teacher", _INTS),
        pa.field("chunk_logp", _FLOATS),  # log p(c) in nats, at T = 1
    ]
)


@dataclass(frozen=True)
class CacheRow:
    """One row as arrays. Optional parts are None where they are not cached."""

    example_id: str
    label: str
    draw: int
    t: float
    student_ids: Int[np.ndarray, " length"]
    spans: Int[np.ndarray, "spans 2"]
    masked: Int[np.ndarray, " masked"]
    teacher_ids: Int[np.ndarray, " teacher_length"] | None
    teacher_masked: Int[np.ndarray, " read"] | None
    split: Bool[np.ndarray, " read"]
    gold_logit: Float[np.ndarray, " read"]
    logsumexp: Float[np.ndarray, "read temperatures"]
    topk_sizes: Int[np.ndarray, " read"] | None
    topk_ids: Int[np.ndarray, " kept"] | None
    topk_logits: Float[np.ndarray, " kept"] | None
    chunk_student: Int[np.ndarray, "chunks 2"] | None
    chunk_teacher: Int[np.ndarray, "chunks 2"] | None
    chunk_logp: Float[np.ndarray, " chunks"] | None

    @property
    def prompt_length(self) -> int:
        """Where the first response begins; the whole length where nothing is trained."""
        return int(self.spans[0, 0]) if len(self.spans) else len(self.student_ids)

    @property
    def maskable(self) -> int:
        """How many positions may be masked."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


def without_masks(row: CacheRow) -> CacheRow:
    """The same example with nothing masked and nothing maskable: it weighs nothing in any loss."""
    none, number = np.zeros(0, np.int32), np.zeros(0, np.float32)
    spans = None if row.chunk_logp is None else np.zeros((0, 2), np.int32)
    return dataclasses.replace(
        row,
        spans=np.zeros((0, 2), np.int32),
        masked=none,
        teacher_masked=None if row.teacher_masked is None else none,
        split=np.zeros(0, bool),
        gold_logit=number,
        logsumexp=row.logsumexp[:0],
        topk_sizes=None if row.topk_sizes is None else none,
        topk_ids=None if row.topk_ids is None else none,
        topk_logits=None if row.topk_logits is None else number,
        chunk_student=spans,
        chunk_teacher=spans,
        chunk_logp=None if row.chunk_logp is None else number,
    )


def to_table(rows: list[CacheRow], temperatures: Sequence[float]) -> pa.Table:
    """Rows as an Arrow table of `SCHEMA`; `temperatures` are those stored per position."""
    one = list(temperatures).index(1.0)
    columns = []
    for field in SCHEMA:
        if field.name == "topk_logp":
            values = [_logp(row, one) for row in rows]
        else:
            values = [getattr(row, field.name) for row in rows]
        if pa.types.is_list(field.type):
            columns.append(_list_column(values, field.type))
        else:
            columns.append(pa.array(values, type=field.type))
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _logp(row: CacheRow, one: int) -> np.ndarray | None:
    if row.topk_logits is None or row.topk_sizes is None:
        return None
    return round_logp(row.topk_logits - np.repeat(row.logsumexp[:, one], row.topk_sizes))


def _list_column(values: list[np.ndarray | None], kind: pa.ListType) -> pa.Array:
    sizes = np.array([0 if v is None else v.size for v in values], np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]).astype(np.int32)
    flat = [v.reshape(-1) for v in values if v is not None]
    content = pa.array(np.concatenate(flat) if flat else np.zeros(0, np.int32)).cast(kind.value_type)
    missing = pa.array([v is None for v in values], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), content, type=kind, mask=missing)


def from_table(table: pa.Table, temperatures: Sequence[float]) -> list[CacheRow]:
    """The inverse of `to_table`, but for what `shared.compact` rounds."""
    one = list(temperatures).index(1.0)
    names = [field.name for field in SCHEMA]
    columns = [_unpack(table.column(name).combine_chunks()) for name in names]
    shapes = {
        "logsumexp": (-1, len(temperatures)),
        **dict.fromkeys(("spans", "chunk_student", "chunk_teacher"), (-1, 2)),
    }
    rows = []
    for values in zip(*columns, strict=True):
        cells: dict[str, Any] = {
            name: value.reshape(shapes[name]) if name in shapes and value is not None else value
            for name, value in zip(names, values, strict=True)
        }
        logp, sizes = cells.pop("topk_logp"), cells["topk_sizes"]
        cells["topk_logits"] = None if logp is None else logp + np.repeat(cells["logsumexp"][:, one], sizes)
        rows.append(CacheRow(**cells))
    return rows


def _unpack(column: pa.Array) -> list:
    if not pa.types.is_list(column.type):
        return column.to_pylist()
    flat = column.values.to_numpy(zero_copy_only=False)
    offsets = column.offsets.to_numpy()
    present = column.is_valid().to_numpy(zero_copy_only=False)
    return [flat[a:b] if ok else None for a, b, ok in zip(offsets[:-1], offsets[1:], present, strict=True)]
