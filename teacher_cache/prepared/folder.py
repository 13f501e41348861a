"""A folder of prepared data.

parts/NAME.parquet   the usable rows of one run of a source's rows; any settings share it
NAME.json            the record of a data set: its parts in order, what became of the rows
NAME.index.parquet   which example of the data set is which example of which part

A part is named by what it is made from (its raw rows and the settings), so it is never wrong.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from shared.aligned.examples import Prepared
from shared.cache.parquet import write_parquet
from shared.data.conversation import identity
from shared.system.atomic import write_bytes
from shared.system.errors import TideError

VERSION = 3  # of the layout and of what preparing does: another version prepares anew
NOT_BAD = ("prompt too long", "token that the teacher writes otherwise")
"""Reasons that are no fault of a row: they are counted, and stop no run."""

_PLACES = 5  # shown of each reason
_PARTS_IN_MEMORY = 8
_REPORT = b"tide.report"
_INTS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),  # of the content
        pa.field("label", pa.string(), nullable=False),  # the row's own id, or empty
        pa.field("student_ids", _INTS, nullable=False),
        pa.field("spans", _INTS, nullable=False),  # start, end, start, end, …
        pa.field("teacher_ids", _INTS),  # null: the teacher reads student_ids
        pa.field("chunks", _INTS, nullable=False),  # teacher start, end, student start, end, …
        pa.field("offsets", _INTS, nullable=False),  # of each span, where the tokenizer is shared
        pa.field("pairs", _INTS),  # student's and teacher's position, …; null: all, by the offsets
    ]
)
_ARRAYS = ("student_ids", "spans", "teacher_ids", "chunks", "offsets", "pairs")

Entries = Int[np.ndarray, "examples 3"]
"""Columns: number of the part, number of the example in it, occurrence of its content."""


@dataclass
class RowReport:
    """What became of the rows of a part, or of a whole source.

    `dropped` counts the rows that cannot be used by reason, and `places` has of each reason the
    first few, as place and detail. `lengths` counts students' sequences by tokens (rounded up),
    `counts` sums over kept rows: tokens of both sides, maskable tokens, chunks, bytes, rows cut.
    """

    source: str = ""
    rows: int = 0
    kept: int = 0
    taken: int = 0  # by the source's weight and limit
    filtered: int = 0
    dropped: dict[str, int] = field(default_factory=Counter)
    places: dict[str, list[Sequence[str]]] = field(default_factory=dict)
    forms: dict[str, int] = field(default_factory=Counter)
    lengths: dict[str, int] = field(default_factory=Counter)
    counts: dict[str, int] = field(default_factory=Counter)

    @property
    def bad(self) -> int:
        """Rows that are at fault."""
        return sum(n for reason, n in self.dropped.items() if reason not in NOT_BAD)

    def drop(self, place: str, reason: str, detail: str) -> None:
        """One more row that cannot be used."""
        self.dropped[reason] += 1
        self.places.setdefault(reason, []).append((place, detail))
        del self.places[reason][_PLACES:]

    def add(self, part: RowReport) -> None:
        """The rows of one more part."""
        self.rows += part.rows
        self.kept += part.kept
        self.filtered += part.filtered
        for name in ("dropped", "forms", "lengths", "counts"):
            getattr(self, name).update(getattr(part, name))
        for reason, places in part.places.items():
            self.places[reason] = [*self.places.get(reason, []), *places][:_PLACES]


def totals(sources: Sequence[RowReport]) -> dict[str, int]:
    """Sums over sources: rows, and what each reason left out."""
    sums: Counter[str] = Counter()
    for source in sources:
        sums.update(source.counts)
        sums.update(source.dropped)
        sums["data_rows"] += source.rows
    return dict(sums)


@dataclass(frozen=True)
class Record:
    """What a prepared data set is: what it was made from, its parts in order, its examples, and
    what was lost. `stamps` tell, without reading them, whether the sources are what they were.
    """

    settings: dict[str, Any]
    stamps: list[Any]
    parts: list[str]
    examples: int
    content: str
    duplicates: int
    sources: list[RowReport]
    shared: bool

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        values = {**vars(self), "sources": [vars(source) for source in self.sources]}
        write_bytes(path, (json.dumps(values, indent=1, sort_keys=True) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Record | None:
        """The record at `path`; None where there is none that can be read (it is made anew)."""
        try:
            values = json.loads(path.read_text())
            values["sources"] = [RowReport(**source) for source in values["sources"]]
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None


@dataclass
class PreparedData:
    """A prepared data set, ready for draws. Parts are read as they are asked for."""

    folder: Path
    record: Record
    entries: Entries
    _parts: dict[int, list[Prepared]] = field(default_factory=dict)

    @property
    def examples(self) -> int:
        """How many there are."""
        return len(self.entries)

    def between(self, start: int, stop: int) -> list[Prepared]:
        """Examples start … stop − 1."""
        examples = []
        for number, row, occurrence in self.entries[start:stop].tolist():
            part = self._parts.pop(number, None)
            if part is None:
                path = part_path(self.folder, self.record.parts[number])
                part = read_part(path, self.record.shared)
            self._parts[number] = part  # the one used last is the last one
            if len(self._parts) > _PARTS_IN_MEMORY:
                del self._parts[next(iter(self._parts))]
            example = part[row]
            examples.append(replace(example, id=identity(example.id, occurrence)))
        return examples

    def __getstate__(self) -> dict[str, Any]:
        """Processes that share the work read parts of their own."""
        return {**self.__dict__, "_parts": {}}


def part_path(folder: Path, name: str) -> Path:
    """Where a part lies."""
    return folder / "parts" / f"{name}.parquet"


def write_part(path: Path, examples: Sequence[Prepared], report: RowReport) -> None:
    """Write a part, whole or not at all."""
    columns = [
        pa.array([example.id for example in examples], pa.string()),
        pa.array([example.label for example in examples], pa.string()),
    ]
    for name in _ARRAYS:
        arrays = [getattr(example, name) for example in examples]
        lists = [None if array is None else array.reshape(-1).tolist() for array in arrays]
        columns.append(pa.array(lists, _INTS))
    metadata = {_REPORT: json.dumps(vars(report), sort_keys=True).encode()}
    write_parquet(path, pa.Table.from_arrays(columns, schema=_SCHEMA.with_metadata(metadata)))


def read_report(path: Path) -> RowReport:
    """What became of the rows of a part. TideError where it is damaged."""
    try:
        metadata = pq.ParquetFile(path).schema_arrow.metadata or {}
        return RowReport(**json.loads(metadata[_REPORT]))
    except Exception as error:  # a footer with a flipped bit leads the library anywhere
        raise _damaged(path, error) from error


def read_keys(path: Path) -> list[str]:
    """The keys of a part's examples."""
    try:
        return pq.read_table(path, columns=["key"]).column("key").to_pylist()
    except Exception as error:
        raise _damaged(path, error) from error


def read_part(path: Path, shared: bool) -> list[Prepared]:
    """The examples of a part, with their keys as ids. TideError where a checksum does not hold."""
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        if not table.schema.equals(_SCHEMA, check_metadata=False):
            raise ValueError("its columns are others")
        keys, labels = table.column("key").to_pylist(), table.column("label").to_pylist()
        arrays = [_arrays_in(table.column(name).combine_chunks()) for name in _ARRAYS]
    except Exception as error:
        raise _damaged(path, error) from error
    examples = []
    for key, label, *values in zip(keys, labels, *arrays, strict=True):
        ids, spans, teacher_ids, chunks, offsets, pairs = values
        spans, chunks = spans.reshape(-1, 2), chunks.reshape(-1, 4)
        pairs = None if pairs is None else pairs.reshape(-1, 2)
        example = Prepared(key, ids, spans, teacher_ids, chunks, shared, offsets, label, pairs)
        examples.append(example)
    return examples


def _arrays_in(column: Any) -> Iterable[Any]:
    """A column of lists as one array, or None, a row."""
    flat, ends = column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()
    present = column.is_valid().to_numpy(zero_copy_only=False)
    return [flat[ends[i] : ends[i + 1]] if there else None for i, there in enumerate(present)]


def save_index(path: Path, entries: Entries) -> None:
    """Which example is which."""
    names = ("part", "row", "occurrence")
    write_parquet(path, pa.table({name: entries[:, i] for i, name in enumerate(names)}))


def load_index(path: Path) -> Entries:
    """The inverse of `save_index`. TideError where it is damaged."""
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        columns = [table.column(name).to_numpy() for name in ("part", "row", "occurrence")]
        return np.stack(columns, axis=1).astype(np.int32)
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> TideError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return TideError(
        f"the file {path} of prepared data cannot be read: {reason}",
        fix="delete this file and run the same command again: it is made anew",
    )
