"""A folder of prepared data, and what a user reads of it before paying for a GPU.

parts/NAME.parquet  the usable rows of one run of a source's rows; any settings share it
NAME.parquet        a data set: its record, and which of its examples is which of which part

Either is named by what it is made from. A part's name has its raw rows in it, so it is never wrong.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int

from shared.aligned.examples import Prepared
from shared.cache.shards import write_parquet
from shared.data.conversation import UNTRAINED, identity
from shared.system.files import TideError
from shared.text.tokenizers import Tokenizer

NOT_BAD = ("prompt too long", "token that the teacher writes otherwise", UNTRAINED)
"""Reasons that are no fault of a row: they are counted, and stop no run."""
# What is lost to a setting, and how it is mended.
_MENDS = {
    "prompt too long": 'raise lengths.student, or train earlier answers too (data.turns = "all")',
    "truncated": "raise lengths.student: what stands behind the cut is not trained",
    "beyond_teacher": "raise lengths.teacher: these rows are trained by cross-entropy only",
}

_PLACES = 5  # shown of each reason
_PARTS_IN_MEMORY = 8
_ABOUT = b"tide.prepared"  # the metadata: a report, or a record
_ENTRY = ("part", "row", "occurrence")
# A part's columns beside the content's key and the row's own label: arrays of `Prepared`, flat.
_SHAPES = {
    "student_ids": (-1,),
    "spans": (-1, 2),
    "teacher_ids": (-1,),  # null: the teacher reads student_ids
    "chunks": (-1, 4),
    "offsets": (-1,),
    "pairs": (-1, 2),  # null: all maskable positions, by the offsets
}
_INTS, _NULLABLE = pa.list_(pa.int32()), ("teacher_ids", "pairs")
_TEXTS = [pa.field(name, pa.string(), nullable=False) for name in ("key", "label")]
_PART = pa.schema(
    [*_TEXTS, *(pa.field(name, _INTS, nullable=name in _NULLABLE) for name in _SHAPES)]
)

logger = logging.getLogger(__name__)

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
        self.rows += part.rows
        self.kept += part.kept
        self.filtered += part.filtered
        for name in ("dropped", "forms", "lengths", "counts"):
            getattr(self, name).update(getattr(part, name))
        for reason, places in part.places.items():
            self.places[reason] = [*self.places.get(reason, []), *places][:_PLACES]


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


class PreparedData:
    """A prepared data set, ready for draws. Parts are read as they are asked for."""

    def __init__(self, folder: Path, record: Record, entries: Entries) -> None:
        self.folder, self.record, self.entries = folder, record, entries
        self._read_part = lru_cache(_PARTS_IN_MEMORY)(read_part)

    @classmethod
    def load(cls, folder: Path, name: str, stamps: list[Any]) -> "PreparedData | None":
        """What `save` wrote. None where it is to be made anew: it is not there or damaged, the
        sources have changed, or a part is missing.
        """
        try:
            table, values = _read(folder / f"{name}.parquet")
            values["sources"] = [RowReport(**source) for source in values["sources"]]
            record = Record(**values)
            entries = np.stack([table.column(name).to_numpy() for name in _ENTRY], axis=1)
        except (TideError, TypeError, KeyError):
            return None
        there = all(part_path(folder, part).exists() for part in record.parts)
        return cls(folder, record, entries) if record.stamps == stamps and there else None

    def save(self, name: str) -> None:
        """Write record and entries, whole or not at all."""
        about = {**vars(self.record), "sources": [vars(s) for s in self.record.sources]}
        table = pa.table({name: self.entries[:, i] for i, name in enumerate(_ENTRY)})
        metadata = {_ABOUT: json.dumps(about, sort_keys=True)}
        write_parquet(self.folder / f"{name}.parquet", table.replace_schema_metadata(metadata))

    @property
    def examples(self) -> int:
        return len(self.entries)

    def between(self, start: int, stop: int) -> list[Prepared]:
        """Examples start … stop − 1."""
        examples = []
        for number, row, occurrence in self.entries[start:stop].tolist():
            path = part_path(self.folder, self.record.parts[number])
            example = self._read_part(path, self.record.shared)[row]
            examples.append(replace(example, id=identity(example.id, occurrence)))
        return examples


def part_path(folder: Path, name: str) -> Path:
    return folder / "parts" / f"{name}.parquet"


def write_part(path: Path, examples: Sequence[Prepared], report: RowReport) -> None:
    """Write a part, whole or not at all."""
    columns: list[Any] = [[e.id for e in examples], [e.label for e in examples]]
    for name in _SHAPES:
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
        arrays: dict[str, Any] = dict.fromkeys(_SHAPES)
        for (name, shape), values in zip(_SHAPES.items(), lists, strict=True):
            if values.is_valid:
                arrays[name] = values.values.to_numpy().reshape(shape)
        examples.append(Prepared(key.as_py(), shared=shared, label=label.as_py(), **arrays))
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


# --- What a user reads


def together(sources: Sequence[RowReport]) -> RowReport:
    """All sources as one."""
    whole = RowReport()
    for source in sources:
        whole.add(source)
    return whole


def describe(data: PreparedData) -> str:
    record, whole = data.record, together(data.record.sources)
    sums = whole.counts
    lines: list[str] = []
    for source in record.sources:
        forms = ", ".join(f"{name} {n:,}" for name, n in Counter(source.forms).most_common())
        lines.append(source.source)
        lines.append(f"  rows read        {source.rows:,}" + (f" (form: {forms})" if forms else ""))
        by = "" if source.taken == source.kept else " (by data.limit, data.weight or dedup)"
        lines.append(f"  usable           {source.kept:,}, taken {source.taken:,}{by}")
        if source.filtered:
            lines.append(f"  filtered         {source.filtered:,}")
        for reason, n in Counter(source.dropped).most_common():
            mend = f"; {_MENDS[reason]}" if reason in _MENDS else ""
            lines.append(f"  left out         {n:,}: {reason}{mend}")
            for place, detail in source.places.get(reason, [])[:3]:
                lines.append(f"                     {place}: {detail}")
        lines.append("")
    lines.append(
        f"{data.examples:,} examples are taken, {record.duplicates:,} contents came before"
    )
    if kept := whole.kept:
        lines.append(
            f"a mean example     {sums['student_tokens'] / kept:,.0f} student tokens, "
            f"{sums['teacher_tokens'] / kept:,.0f} teacher tokens, "
            f"{sums['turns'] / kept:.2f} trained answers, {sums['chunks'] / kept:,.0f} chunks"
        )
        share = sums["maskable"] / sums["student_tokens"]
        lines.append(f"trained            {share:.1%} of the student's tokens")
    lengths = Counter({int(length): n for length, n in whole.lengths.items()})
    if every := sorted(lengths.elements()):
        half, most = every[len(every) // 2], every[len(every) * 9 // 10]
        lines.append(f"student tokens     half have up to {half}, 90 % {most}, all {every[-1]}")
    return "\n".join([*lines, *_lost(sums)])


def losses(data: PreparedData) -> list[str]:
    """A line for each reason that left rows out, and for what was lost of the others."""
    whole = together(data.record.sources)
    dropped = Counter(whole.dropped).most_common()
    lines = [f"left out of {whole.rows:,} rows: {n:,} ({reason})" for reason, n in dropped]
    return [*lines, *_lost(whole.counts)]


def warn(data: PreparedData) -> None:
    """Say loudly what many rows are lost to, and which setting mends it."""
    whole = together(data.record.sources)
    for name, mend in _MENDS.items():
        n = whole.counts.get(name, 0) + whole.dropped.get(name, 0)
        if n > 0.1 * whole.rows:
            logger.warning("%s: %d of %d rows; %s", name, n, whole.rows, mend)


def show(examples: Sequence[Prepared], student: Tokenizer) -> str:
    """Examples as the student reads them: prompt as it is, trained answers in ⟦ ⟧."""
    blocks = []
    for number, example in enumerate(examples):
        label = f" ({example.label})" if example.label else ""
        text, at = f"── example {number}: {example.id}{label}\n", 0
        for start, stop in example.spans.tolist():
            text += student.decode(example.student_ids[at:start].tolist())
            text += f"⟦{student.decode(example.student_ids[start:stop].tolist())}⟧"
            at = stop
        blocks.append(text + student.decode(example.student_ids[at:].tolist()))
    return "\n\n".join(blocks)


def _lost(sums: dict[str, int]) -> Iterator[str]:
    if n := sums.get("truncated"):
        yield f"answers cut        {n:,}, at the student's length; {_MENDS['truncated']}"
    if n := sums.get("beyond_teacher"):
        yield f"cross-entropy only {n:,} examples, whose prompt alone exceeds lengths.teacher"
    for name, n in sums.items():
        if name.startswith(("not written", "not read")):
            yield f"{name}, in {n:,} conversations"
    if whole := sums.get("response_bytes"):
        lost, examples = sums.get("unaligned_bytes", 0), sums.get("unaligned_examples", 0)
        yield (
            f"without alignment  {lost:,} of {whole:,} response bytes ({lost / whole:.2%}), "
            f"in {examples:,} examples"
        )
