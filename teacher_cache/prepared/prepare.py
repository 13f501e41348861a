"""`prepare`: sources in, prepared data out. Once for any number of caches; stopped and run again, it goes on.

Raw rows are cut into parts by their content; each part that is not there yet is prepared, in processes where there are
many. What was prepared before is found again by its name, also after rows were mended elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shared.data.conversation import BadRow
from shared.data.files import ending
from shared.data.reading import refuse_bad_rows
from shared.data.sources import describe_source, source_files, source_rows
from shared.settings.build import to_plain
from shared.settings.config import DataConfig
from shared.system.errors import TideError
from shared.system.locks import hold
from teacher_cache.prepared.cutting import RawPart, cut
from teacher_cache.prepared.folder import (
    PreparedData,
    Record,
    SourceReport,
    load_index,
    part_path,
    save_index,
)
from teacher_cache.prepared.parts import VERSION, PartSummary, read_keys, read_summary
from teacher_cache.prepared.selecting import Selector
from teacher_cache.prepared.work import Recipe, Worker, prepare_in_worker, start_worker

_INLINE_PARTS = 12
"""So few new parts are prepared here: starting processes would take longer."""

NOT_BAD = ("prompt too long", "token that the teacher writes otherwise")
"""Reasons that are no fault of a row: they are counted, and stop no run."""


@dataclass(frozen=True)
class Request:
    """What is to be prepared, how, and where. `identity`: what tells these tokenizers and templates from others."""

    sources: tuple[DataConfig, ...]
    recipe: Recipe
    identity: dict[str, Any]
    folder: Path
    dedup: bool = False
    workers: int = 0

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that the outcome depends on beside the rows."""
        own = {"version": VERSION, **self.identity, "lengths": to_plain(self.recipe.lengths)}
        own |= {
            name: getattr(self.recipe, name) for name in ("skip_first", "positions", "own_text")
        }
        own["date"] = str(self.recipe.date)
        return json.loads(
            json.dumps({**own, "sources": to_plain(self.sources), "dedup": self.dedup})
        )

    @property
    def name(self) -> str:
        """Of the record."""
        return _digest(self.settings)[:16]

    def part_name(self, data: DataConfig, part: RawPart) -> str:
        """Of a part: what its examples depend on, and no more."""
        settings = {k: v for k, v in self.settings.items() if k not in ("sources", "dedup")}
        own = to_plain(data)
        for name in ("source", "limit", "weight", "allow_bad_rows"):
            own.pop(name)
        return _digest([settings, own, part.digest])[:24]


def prepare(request: Request) -> PreparedData:
    """The prepared data that `request` describes; computed where it is not there yet.

    TideError where a source cannot be read, where more rows cannot be used than is allowed, and where none can be.
    """
    path = request.folder / f"{request.name}.json"
    index = path.with_suffix(".index.parquet")
    stamps = json.loads(json.dumps([_stamp(source) for source in request.sources]))
    with hold(request.folder / ".lock", f"the prepared data in {request.folder}", wait=True):
        record = Record.load(path)
        names = [] if record is None else record.parts
        whole = index.exists() and all(part_path(request.folder, name).exists() for name in names)
        if record is None or record.stamps != stamps or not whole:
            record, entries = _prepare(request, stamps)
            save_index(index, entries)
            record.save(path)
        return PreparedData(request.folder, record, load_index(index))


def _prepare(request: Request, stamps: list[Any]) -> tuple[Record, Any]:
    selector, names, reports = Selector(request.dedup), [], []
    with (
        _Crew(request) as crew,
        tqdm(unit="row", desc="prepare", smoothing=0, dynamic_ncols=True) as bar,
    ):
        for data in request.sources:
            selector.begin()
            gathered = _Gathered()
            estimate = _Estimate(data.source, bar)
            for part, name, summary in crew.prepared(data):
                estimate.read(len(part.rows), part.size)
                gathered.add(part, summary)
                names.append(name)
                gathered.refuse_early(data)
                if not selector.take(
                    len(names) - 1, read_keys(part_path(request.folder, name)), data
                ):
                    break
            gathered.refuse(data)
            reports.append(gathered.report(data, selector.taken[-1]))
    entries, content = selector.finish()
    rows = sum(report.rows for report in reports)
    if not rows:
        raise TideError(
            f"{reports[0].source} has no examples: it holds no rows",
            fix="check the file given as --data",
        )
    if not len(entries):
        reasons = {k: v for report in reports for k, v in report.dropped.items()}
        filtered = sum(report.filtered for report in reports)
        raise TideError(
            f"no example of {' + '.join(r.source for r in reports)} fits: of {rows:,} rows "
            f"{filtered:,} were filtered, and left out were {json.dumps(reasons)}{_first_places(reports)}",
            expected="conversations whose prompts are shorter than lengths.student and lengths.teacher",
            fix="raise the lengths, mend the filters, or use other data",
        )
    record = Record(
        request.settings,
        stamps,
        names,
        len(entries),
        content,
        selector.duplicates,
        reports,
        request.recipe.shared,
    )
    return record, entries


def _first_places(reports: Sequence[SourceReport]) -> str:
    """The first row of each reason, a line each."""
    shown = {
        reason: rows[0] for report in reports for reason, rows in report.places.items() if rows
    }
    return "".join(f"\n    {place}: {detail}" for place, detail in shown.values())


class _Crew:
    """Prepares parts in order: here, or in processes once there are more than a few new ones."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._here: Worker | None = None
        self._pool: ProcessPoolExecutor | None = None
        self._new = 0

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def prepared(self, data: DataConfig) -> Iterator[tuple[RawPart, str, PartSummary]]:
        """Every part of a source, in order, with its name and what became of its rows."""
        waiting: deque[tuple[RawPart, str, Callable[[], PartSummary]]] = deque()
        for part in cut(source_rows(data.source)):
            name = self._request.part_name(data, part)
            waiting.append(
                (part, name, self._begin(part, data, part_path(self._request.folder, name)))
            )
            if len(waiting) > self._ahead:
                part, name, result = waiting.popleft()  # noqa: PLW2901
                yield part, name, result()
        yield from ((part, name, result()) for part, name, result in waiting)

    @property
    def _processes(self) -> int:
        return self._request.workers or os.cpu_count() or 1

    @property
    def _ahead(self) -> int:
        return 0 if self._pool is None else 2 * self._processes

    def _begin(self, part: RawPart, data: DataConfig, path: Path) -> Callable[[], PartSummary]:
        if path.exists():
            return partial(read_summary, path)
        self._new += 1
        if self._new <= _INLINE_PARTS or self._processes == 1:
            if self._here is None:
                self._here = Worker(self._request.recipe)
            return partial(self._here.prepare, part, data, path)
        if self._pool is None:
            context = multiprocessing.get_context(
                "spawn"
            )  # threads of the model do not survive a fork
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            make = partial(Worker, self._request.recipe)
            self._pool = ProcessPoolExecutor(
                self._processes, context, start_worker, (make, os.getpid())
            )
        future: Future[PartSummary] = self._pool.submit(prepare_in_worker, part, data, path)
        return future.result


class _Gathered:
    """What became of the rows of one source, part by part."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, int]] = {
            n: {} for n in ("dropped", "forms", "lengths", "counts")
        }
        self._rows = self._kept = self._filtered = 0
        self._places: dict[str, list[tuple[str, str]]] = {}

    def add(self, part: RawPart, summary: PartSummary) -> None:
        self._rows, self._kept = self._rows + summary.rows, self._kept + summary.kept
        self._filtered += summary.filtered
        for name, sums in self._sums.items():
            for key, n in getattr(summary, name).items():
                sums[key] = sums.get(key, 0) + n
        for reason, shown in summary.examples.items():
            mine = self._places.setdefault(reason, [])
            mine += [(part.places[row], detail) for row, detail in shown][: 5 - len(mine)]

    @property
    def _bad(self) -> int:
        return sum(n for reason, n in self._sums["dropped"].items() if reason not in NOT_BAD)

    def refuse_early(self, data: DataConfig) -> None:
        """Stop as soon as no number of good rows to come is likely to mend it."""
        if (data.allow_bad_rows >= 1 and self._bad > data.allow_bad_rows) or self._bad > max(
            1000, self._rows / 2
        ):
            self.refuse(data)

    def refuse(self, data: DataConfig) -> None:
        bad = [(place, reason, detail) for reason, shown in self._places.items() for place, detail in shown
               if reason not in NOT_BAD]  # fmt: skip
        refuse_bad_rows(data, self._bad, self._rows, [BadRow(*row) for row in bad])

    def report(self, data: DataConfig, taken: int) -> SourceReport:
        source = describe_source(data.source)
        return SourceReport(
            source, self._rows, self._kept, taken, self._filtered, places=self._places, **self._sums
        )


class _Estimate:
    """The number of rows in all, from the bytes read and the bytes to read, where files are neither packed nor
    binary.
    """

    def __init__(self, source: str, bar: Any) -> None:
        files = source_files(source)
        plain = files and all(
            ending(f) == f.suffix and f.suffix in (".jsonl", ".ndjson", ".csv", ".json")
            for f in files
        )
        self._bytes = sum(f.stat().st_size for f in files) if plain else 0
        self._bar, self._before, self._rows, self._read = bar, bar.n, 0, 0

    def read(self, rows: int, size: int) -> None:
        self._rows, self._read = self._rows + rows, self._read + size
        if self._bytes and self._read:
            share = max(1.0, self._bytes / self._read)
            self._bar.total = self._before + round(self._rows * share)
        self._bar.update(rows)


def _stamp(data: DataConfig) -> list[Any]:
    """What tells, without reading it, whether a source is what it was."""
    if data.source.startswith("stdlib:"):
        return [data.source, platform.python_version()]
    files = source_files(data.source)
    return [data.source, *([str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
