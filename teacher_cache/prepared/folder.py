"""A folder of prepared data.

parts/NAME.parquet  the usable rows of one run of a source's rows; any settings share it
NAME.parquet        a data set: its record, and which of its examples is which of which part

Either is named by what it is made from. A part's name has its raw rows in it, so it is never wrong.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from shared.aligned.examples import Prepared
from shared.cache.shards import write_parquet
from shared.data.conversation import identity
from shared.system.errors import TideError

NOT_BAD = ("prompt too long", "token that the teacher writes otherwise")
"""Reasons that are no fault of a row: they are counted, and stop no run."""

_PLACES = 5  # shown of each reason
_PARTS_IN_MEMORY = 8
_ABOUT = b"tide.prepared"  # the metadata: a report, or a record
_INTS = pa.list_(pa.int32())
_PART = pa.schema(
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
        self.places[reason] = [*self.places.get(reason, []), (place, detail)][:_PLACES]

    def add(self, part: "RowReport") -> None:
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
    """What a prepared data set is: its parts in order, a hash of its examples' contents, and what
    became of the rows. `stamps` tell, without reading them, whether the sources are what they were.
    """

    stamps: list[Any]
    parts: list[str]
    content: str
    duplicates: int
    sources: list[RowReport]
    shared: bool


@dataclass
class PreparedData:
    """A prepared data set, ready for draws. Parts are read as they are asked for."""

    folder: Path
    record: Record
    entries: Entries
    _parts: dict[int, list[Prepared]] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, name: str, stamps: list[Any]) -> "PreparedData | None":
        """What `save` wrote. None where it is to be made anew: it is not there or damaged, the
        sources have changed, or a part is missing.
        """
        try:
            table, values = _read(folder / f"{name}.parquet")
            values["sources"] = [RowReport(**source) for source in values["sources"]]
            record = Record(**values)
            columns = [table.column(name).to_numpy() for name in ("part", "row", "occurrence")]
        except (TideError, TypeError, KeyError):
            return None
        there = all(part_path(folder, part).exists() for part in record.parts)
        if record.stamps != stamps or not there:
            return None
        return cls(folder, record, np.stack(columns, axis=1).astype(np.int32))

    def save(self, name: str) -> None:
        """Write record and entries, whole or not at all."""
        about = {**vars(self.record), "sources": [vars(s) for s in self.record.sources]}
        names = ("part", "row", "occurrence")
        table = pa.table({name: self.entries[:, i] for i, name in enumerate(names)})
        metadata = {_ABOUT: json.dumps(about, sort_keys=True)}
        write_parquet(self.folder / f"{name}.parquet", table.replace_schema_metadata(metadata))

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
    columns: list[list[Any]] = [
        [example.id for example in examples],
        [example.label for example in examples],
    ]
    for name in _PART.names[2:]:
        arrays = [getattr(example, name) for example in examples]
        columns.append([None if array is None else array.reshape(-1) for array in arrays])
    typed = [pa.array(values, f.type) for values, f in zip(columns, _PART, strict=True)]
    metadata = {_ABOUT: json.dumps(vars(report), sort_keys=True)}
    write_parquet(path, pa.table(typed, _PART.with_metadata(metadata)))


def read_summary(path: Path) -> tuple[RowReport, list[str]]:
    """What became of the rows of a part, and its examples' keys. TideError where it is damaged."""
    table, report = _read(path, ["key"])
    return RowReport(**report), table.column("key").to_pylist()


def read_part(path: Path, shared: bool) -> list[Prepared]:
    """The examples of a part, with their keys as ids. TideError where it is damaged."""
    table, _ = _read(path)
    examples = []
    for key, label, *lists in zip(*table.columns, strict=True):
        arrays = [values.values.to_numpy() if values.is_valid else None for values in lists]
        ids, spans, teacher_ids, chunks, offsets, pairs = arrays
        assert ids is not None and spans is not None and chunks is not None and offsets is not None
        pairs = None if pairs is None else pairs.reshape(-1, 2)
        spans, chunks = spans.reshape(-1, 2), chunks.reshape(-1, 4)
        name, own = key.as_py(), label.as_py()
        example = Prepared(name, ids, spans, teacher_ids, chunks, shared, offsets, own, pairs)
        examples.append(example)
    return examples


def _read(path: Path, columns: list[str] | None = None) -> tuple[pa.Table, dict[str, Any]]:
    """A file's table, its pages' checksums held against it, and what it says of itself."""
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read(columns)
        return table, json.loads(table.schema.metadata[_ABOUT])
    except Exception as error:  # a flipped bit leads the library anywhere
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TideError(
            f"the part {path} of prepared data cannot be read: {reason}",
            fix="delete this file and run the same command again: it is prepared anew",
        ) from error
