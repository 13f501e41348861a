"""A folder of prepared data: parts that any settings share, and for each data set its record and index."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.aligned.examples import Prepared
from shared.cache.parquet import write_parquet
from shared.data.conversation import identity
from shared.system.atomic import write_bytes
from shared.system.errors import TideError
from teacher_cache.prepared.parts import read_part
from teacher_cache.prepared.selecting import Entries

_PARTS_IN_MEMORY = 8


@dataclass(frozen=True)
class SourceReport:
    """What became of one source: rows by fate, with the first places of those that cannot be used."""

    source: str
    rows: int
    kept: int
    taken: int
    filtered: int
    dropped: dict[str, int]
    places: dict[str, list[tuple[str, str]]]
    forms: dict[str, int]
    lengths: dict[str, int]
    counts: dict[str, int]


@dataclass(frozen=True)
class Record:
    """What a prepared data set is: its parts in order, its examples, what it was made from and what was lost."""

    identity: dict[str, Any]
    stamps: list[Any]
    parts: list[str]
    examples: int
    content: str
    duplicates: int
    sources: list[SourceReport]
    shared: bool

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        write_bytes(path, (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Record | None:
        """The record at `path`; None where there is none that can be read (it is made anew)."""
        try:
            values = json.loads(path.read_text())
            values["sources"] = [SourceReport(**source) for source in values["sources"]]
            return cls(**values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None


def part_path(folder: Path, name: str) -> Path:
    """Where a part lies."""
    return folder / "parts" / f"{name}.parquet"


def save_index(path: Path, entries: Entries) -> None:
    """Which example is which: part, number in it, occurrence."""
    table = pa.table({name: entries[:, i] for i, name in enumerate(("part", "row", "occurrence"))})

    write_parquet(path, table)


def load_index(path: Path) -> Entries:
    """The inverse of `save_index`. TideError where it is damaged."""
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        return np.stack(
            [table.column(n).to_numpy() for n in ("part", "row", "occurrence")], axis=1
        ).astype(np.int32)
    except Exception as error:
        raise TideError(
            f"the index {path} of prepared data cannot be read: {(str(error).splitlines() or [''])[0]}",
            fix="delete this file and run the same command again: it is made anew",
        ) from error


@dataclass
class PreparedData:
    """A prepared data set, ready for draws. Parts are read as they are asked for; a few stay in memory."""

    folder: Path
    record: Record
    entries: Entries
    _parts: OrderedDict[int, list[tuple[str, Prepared]]] = field(default_factory=OrderedDict)

    @property
    def examples(self) -> int:
        """How many there are."""
        return len(self.entries)

    @property
    def source(self) -> str:
        """The sources in words."""
        return " + ".join(source.source for source in self.record.sources)

    def between(self, start: int, stop: int) -> list[Prepared]:
        """Examples start … stop − 1."""
        return [self._example(*entry) for entry in self.entries[start:stop].tolist()]

    def _example(self, part: int, row: int, occurrence: int) -> Prepared:
        if part not in self._parts:
            path = part_path(self.folder, self.record.parts[part])
            self._parts[part] = read_part(path, self.record.shared)
            if len(self._parts) > _PARTS_IN_MEMORY:
                self._parts.popitem(last=False)
        self._parts.move_to_end(part)
        key, example = self._parts[part][row]
        return (
            example
            if occurrence == 0
            else dataclasses.replace(example, id=identity(key, occurrence))
        )

    def __getstate__(self) -> dict[str, Any]:
        """Processes that share the work read parts of their own."""
        return {
            "folder": self.folder,
            "record": self.record,
            "entries": self.entries,
            "_parts": OrderedDict(),
        }


def totals(sources: Sequence[SourceReport]) -> dict[str, int]:
    """Sums over sources: rows, and what each reason left out."""
    found: dict[str, int] = {}
    for source in sources:
        for name, n in (
            *source.counts.items(),
            *source.dropped.items(),
            ("data_rows", source.rows),
        ):
            found[name] = found.get(name, 0) + n
    return found
