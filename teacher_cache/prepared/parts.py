"""A part of prepared data on disk: the usable rows of one stretch of a source, and what became of the others.

A part is named by what it is made from (its raw rows and the settings), so it is never wrong: mended data make new
parts where rows have changed and keep the others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.aligned.examples import Prepared
from shared.cache.parquet import write_parquet
from shared.system.errors import TideError

VERSION = 2
"""Of the layout and of what preparing does: another version prepares anew."""

_INTS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),  # of the content
        pa.field("label", pa.string(), nullable=False),  # the row's own id, or empty
        pa.field("row", pa.int32(), nullable=False),  # which of the part's raw rows
        pa.field("student_ids", _INTS, nullable=False),
        pa.field("spans", _INTS, nullable=False),  # start, end, start, end, …
        pa.field("teacher_ids", _INTS),  # null: the teacher reads student_ids
        pa.field("chunks", _INTS, nullable=False),  # teacher start, end, student start, end, …
        pa.field("offsets", _INTS, nullable=False),  # of each span, where the tokenizer is shared
        pa.field(
            "pairs", _INTS
        ),  # student's and teacher's position, … that may be asked; null: all, by the offsets
    ]
)
_SUMMARY = b"tide.summary"
_SHOWN = 5


@dataclass
class PartSummary:
    """What became of the raw rows of a part. `dropped`: rows by reason; `examples`: of each reason the first few, as
    (number of the row, detail); `lengths`: how many students' sequences are that many tokens long.
    """

    rows: int = 0
    kept: int = 0
    filtered: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    forms: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    """Sums over kept rows: tokens of both sides, maskable tokens, chunks, bytes, rows that were cut."""

    def drop(self, row: int, reason: str, detail: str) -> None:
        """One more raw row that cannot be used."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < _SHOWN:
            shown.append((row, detail))


def write_part(path: Path, kept: Sequence[tuple[str, int, Prepared]], summary: PartSummary) -> None:
    """Write a part, whole or not at all; `kept`: key, number of the raw row, example."""

    def lists(values: list[np.ndarray | None]) -> pa.Array:
        return pa.array([None if v is None else v.reshape(-1).tolist() for v in values], _INTS)

    examples = [p for _, _, p in kept]
    columns = [
        pa.array([key for key, _, _ in kept], pa.string()),
        pa.array([p.label for p in examples], pa.string()),
        pa.array([row for _, row, _ in kept], pa.int32()),
        lists([p.student_ids for p in examples]),
        lists([p.spans for p in examples]),
        lists([p.teacher_ids for p in examples]),
        lists([p.chunks for p in examples]),
        lists([p.offsets for p in examples]),
        lists([p.pairs for p in examples]),
    ]
    schema = _SCHEMA.with_metadata({_SUMMARY: json.dumps(asdict(summary), sort_keys=True).encode()})
    table = pa.Table.from_arrays(columns, schema=schema)

    write_parquet(path, table)


def read_summary(path: Path) -> PartSummary:
    """What a part says of itself. TideError where it is damaged."""
    try:
        metadata = pq.ParquetFile(path).schema_arrow.metadata or {}
        values = json.loads(metadata[_SUMMARY])
        shown = {
            reason: [(int(row), str(detail)) for row, detail in v]
            for reason, v in values.pop("examples").items()
        }
        return PartSummary(**values, examples=shown)
    except Exception as error:  # a footer with a flipped bit leads the library anywhere
        raise _damaged(path, error) from error


def read_keys(path: Path) -> list[str]:
    """The keys of a part's examples."""
    try:
        return pq.read_table(path, columns=["key"]).column("key").to_pylist()
    except Exception as error:
        raise _damaged(path, error) from error


def read_part(path: Path, shared: bool) -> list[tuple[str, Prepared]]:
    """The examples of a part with their keys; ids are given by the index. TideError where a checksum does not hold."""
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        if not table.schema.equals(_SCHEMA, check_metadata=False):
            raise ValueError("its columns are others")
        arrays = {
            name: _arrays(table.column(name))
            for name in ("student_ids", "spans", "teacher_ids", "chunks", "offsets", "pairs")
        }
        keys, labels = table.column("key").to_pylist(), table.column("label").to_pylist()
    except Exception as error:
        raise _damaged(path, error) from error
    found = []
    for i, (key, label) in enumerate(zip(keys, labels, strict=True)):
        ids, spans, teacher, chunks, offsets, pairs = (values[i] for values in arrays.values())
        assert ids is not None and spans is not None and chunks is not None and offsets is not None
        pairs = None if pairs is None else pairs.reshape(-1, 2)
        spans, chunks = spans.reshape(-1, 2), chunks.reshape(-1, 4)
        example = Prepared(key, ids, spans, teacher, chunks, shared, offsets, label, pairs)
        found.append((key, example))
    return found


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray | None]:
    values = column.combine_chunks()
    flat, ends = values.values.to_numpy(zero_copy_only=False), values.offsets.to_numpy()
    present = values.is_valid().to_numpy(zero_copy_only=False)
    return [
        flat[a:b] if ok else None for a, b, ok in zip(ends[:-1], ends[1:], present, strict=True)
    ]


def _damaged(path: Path, error: Exception) -> TideError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return TideError(
        f"the part {path} of prepared data cannot be read: {reason}",
        fix="delete this file and run the same command again: it is prepared anew",
    )
