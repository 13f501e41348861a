"""`prepare`: sources in, prepared data out. Once for any number of caches; stopped and run again,
it goes on.

A source is cut into parts of a fixed number of rows. Each part that is not there yet is prepared, in
processes where there are many, and found again by its name ever after.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import multiprocessing
import os
import platform
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from shared.aligned.examples import Preparer, SharedVocabulary
from shared.data.conversation import ChatExample, conversation, copies
from shared.data.files import Place, Raw
from shared.data.reading import BadRow, refuse_bad_rows
from shared.data.sources import describe_source, source_files, source_rows
from shared.settings.build import to_plain
from shared.settings.config import DataConfig, LengthConfig
from shared.system.errors import TideError, Unusable
from shared.system.locks import hold
from shared.system.signals import serve_parent
from shared.text.tokenizers import Tokenizer
from teacher_cache.prepared.folder import (
    NOT_BAD,
    VERSION,
    Entries,
    PreparedData,
    Record,
    RowReport,
    load_index,
    part_path,
    read_keys,
    read_report,
    save_index,
    write_part,
)

_ROWS_OF_A_PART = 256
_PARTS_HERE = 12  # so few new parts are prepared here: starting processes would take longer
_LENGTH_STEP = 32  # of the histogram of lengths, in tokens

Rows = Sequence[tuple[Place, Raw]]


@dataclass(frozen=True)
class PrepareRequest:
    """What is to be prepared, how, and where. All but the rows that the outcome depends on.

    `identity` tells these tokenizers and templates from others; `student` and `teacher` are their
    folders. `shared`: the teacher reads the student's ids. `date`: what templates take for today.
    `positions`, `own_text` and `skip_first` are those of `Preparer`. `workers` 0: one a processor.
    """

    sources: tuple[DataConfig, ...]
    folder: Path
    identity: dict[str, Any]
    student: str
    teacher: str
    shared: bool
    student_mask_id: int
    teacher_mask_id: int
    lengths: LengthConfig
    date: datetime.date | None = None
    positions: Literal["content", "response"] = "response"
    own_text: bool = False
    skip_first: bool = False
    dedup: bool = False
    workers: int = 0

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that an example depends on beside its row."""
        names = ("skip_first", "positions", "own_text")
        own = {name: getattr(self, name) for name in names}
        own |= {"version": VERSION, "date": str(self.date), "lengths": to_plain(self.lengths)}
        return {**self.identity, **own}

    def preparer(self, data: DataConfig, student: Tokenizer, teacher: Tokenizer) -> Preparer:
        """What turns this source's conversations into examples."""
        return Preparer(
            student,
            SharedVocabulary.between(student, teacher) if self.shared else teacher,
            self.lengths,
            self.student_mask_id,
            self.teacher_mask_id,
            data.turns,
            self.positions,
            self.own_text,
            self.skip_first,
        )


def prepare(request: PrepareRequest) -> PreparedData:
    """The prepared data that `request` describes; computed where it is not there yet.

    TideError where a source cannot be read, where more rows cannot be used than is allowed, and
    where none can be.
    """
    whole = [request.settings, to_plain(request.sources), request.dedup]
    path = request.folder / f"{_digest(whole)[:16]}.json"
    index = path.with_suffix(".index.parquet")
    stamps = [_stamp(data.source) for data in request.sources]
    with hold(request.folder / ".lock", f"the prepared data in {request.folder}", wait=True):
        record = Record.load(path)
        if record is not None and record.stamps == stamps and index.exists():
            if all(part_path(request.folder, name).exists() for name in record.parts):
                return PreparedData(request.folder, record, load_index(index))
        record, entries = _prepare(request, stamps)
        save_index(index, entries)
        record.save(path)
        return PreparedData(request.folder, record, entries)


def _stamp(source: str) -> list[Any]:
    """What tells, without reading it, whether a source is what it was."""
    if source.startswith("stdlib:"):
        return [source, platform.python_version()]
    stats = [(str(file), file.stat()) for file in source_files(source)]
    return [source, *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]


def _prepare(request: PrepareRequest, stamps: list[Any]) -> tuple[Record, Entries]:
    selector = Selector(request.dedup)
    names: list[str] = []
    reports: list[RowReport] = []
    with ExitStack() as stack, tqdm(unit="row", desc="prepare", dynamic_ncols=True) as bar:
        workers = _Workers(request, stack)
        for data in request.sources:
            report = RowReport(describe_source(data.source))
            selector.begin()
            for name, part in workers.parts(data):
                bar.update(part.rows)
                report.add(part)
                names.append(name)
                # Stop as soon as no number of good rows to come is likely to mend it.
                if report.bad > max(1000, report.rows / 2):
                    _refuse_bad_rows(data, report)
                keys = read_keys(part_path(request.folder, name))
                if not selector.take(len(names) - 1, keys, data):
                    break
            _refuse_bad_rows(data, report)
            report.taken = selector.taken
            reports.append(report)
    entries, content = selector.finish()
    if not len(entries):
        _refuse_empty(reports)
    settings = {**request.settings, "sources": to_plain(request.sources), "dedup": request.dedup}
    examples, shared = len(entries), request.shared
    duplicates = selector.duplicates
    record = Record(settings, stamps, names, examples, content, duplicates, reports, shared)
    return record, entries


def _refuse_bad_rows(data: DataConfig, report: RowReport) -> None:
    bad = []
    for reason, places in report.places.items():
        if reason not in NOT_BAD:
            bad += [BadRow(place, reason, detail) for place, detail in places]
    refuse_bad_rows(data, report.bad, report.rows, bad)


def _refuse_empty(reports: Sequence[RowReport]) -> None:
    rows = sum(report.rows for report in reports)
    if not rows:
        raise TideError(
            f"{reports[0].source} has no examples: it holds no rows",
            fix="check the file given as --data",
        )
    dropped, first = {}, ""
    for report in reports:
        dropped |= report.dropped
        first += "".join(f"\n    {': '.join(places[0])}" for places in report.places.values())
    filtered = sum(report.filtered for report in reports)
    raise TideError(
        f"no example of {' + '.join(r.source for r in reports)} fits: of {rows:,} rows "
        f"{filtered:,} were filtered, and left out were {json.dumps(dropped)}{first}",
        expected="conversations whose prompts are shorter than lengths.student and lengths.teacher",
        fix="raise the lengths, mend the filters, or use other data",
    )


@dataclass
class Selector:
    """Which prepared examples are taken, and in what order: weights, limits, repeats, and several
    sources interleaved. It takes the examples of one source after another, part by part.
    """

    dedup: bool
    duplicates: int = 0
    _seen: Counter[int] = field(default_factory=Counter)
    _sources: list[list[tuple[int, int, int, str]]] = field(default_factory=list)

    def begin(self) -> None:
        """The next source."""
        self._sources.append([])

    def take(self, part: int, keys: Sequence[str], config: DataConfig) -> bool:
        """Take what the source's weight and limit allow of a part's examples; False at the limit."""
        mine = self._sources[-1]
        for row, key in enumerate(keys):
            for _ in range(copies(key, config)):
                if len(mine) == config.limit:
                    return False
                number = int(key, 16)  # half the memory of the text
                occurrence = self._seen[number]
                self._seen[number] += 1
                self.duplicates += occurrence > 0
                if not (occurrence and self.dedup):
                    mine.append((part, row, occurrence, key))
        return len(mine) != config.limit

    @property
    def taken(self) -> int:
        """Examples of the source that came last."""
        return len(self._sources[-1])

    def finish(self) -> tuple[Entries, str]:
        """All examples, the sources interleaved evenly, each in its own order; and a hash of their
        contents.
        """
        places = [(np.arange(len(mine)) + 0.5) / max(1, len(mine)) for mine in self._sources]
        examples = [example for mine in self._sources for example in mine]
        examples = [examples[i] for i in np.argsort(np.concatenate(places), kind="stable").tolist()]
        digest = hashlib.sha256()
        for _, _, occurrence, key in examples:
            digest.update(f"{key}#{occurrence}\n".encode())
        entries = np.array([example[:3] for example in examples], np.int32).reshape(-1, 3)
        return entries, digest.hexdigest()[:32]


class _Workers:
    """Prepares parts in order: here, or in processes once there are more than a few new ones."""

    def __init__(self, request: PrepareRequest, stack: ExitStack) -> None:
        self._request, self._stack = request, stack
        self._processes = request.workers or os.cpu_count() or 1
        self._new = 0

    def parts(self, data: DataConfig) -> Iterator[tuple[str, RowReport]]:
        """Every part of a source, in order: its name, and what became of its rows."""
        own = to_plain(data)
        for name in ("limit", "weight", "allow_bad_rows"):
            own.pop(name)
        waiting: deque[tuple[str, Callable[[], RowReport]]] = deque()
        stream = iter(source_rows(data.source))
        while rows := list(islice(stream, _ROWS_OF_A_PART)):
            content = hashlib.sha256()
            for place, raw in rows:
                text = raw if isinstance(raw, bytes) else _plain(raw)
                content.update(f"{place}\0{len(text)}\0".encode("utf-8", "surrogatepass") + text)
            name = _digest([self._request.settings, own, content.hexdigest()])[:24]
            waiting.append((name, self._begin(rows, data, part_path(self._request.folder, name))))
            ahead = 2 * self._processes if "_pool" in self.__dict__ else 0
            if len(waiting) > ahead:
                name, report = waiting.popleft()
                yield name, report()
        yield from ((name, report()) for name, report in waiting)

    def _begin(self, rows: Rows, data: DataConfig, path: Path) -> Callable[[], RowReport]:
        """Begin a part where it is not there; what returned waits for it."""
        if path.exists():
            return partial(read_report, path)
        self._new += 1
        if self._new <= _PARTS_HERE or self._processes == 1:
            return partial(self._here.prepare, rows, data, path)
        return self._pool.submit(_prepare_in_process, rows, data, path).result

    @cached_property
    def _here(self) -> Worker:
        return Worker(self._request)

    @cached_property
    def _pool(self) -> ProcessPoolExecutor:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        context = multiprocessing.get_context("spawn")  # a model's threads do not survive a fork
        begin = (self._request, os.getpid())
        pool = ProcessPoolExecutor(self._processes, context, _start_process, begin)
        self._stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        return pool


class Worker:
    """Prepares parts in one process: tokenizers are loaded once."""

    def __init__(self, request: PrepareRequest) -> None:
        self._request = request
        self._student = Tokenizer.load(request.student, request.date)
        self._teacher = Tokenizer.load(request.teacher, request.date)
        self._preparers: dict[DataConfig, Preparer] = {}

    def prepare(self, rows: Rows, data: DataConfig, path: Path) -> RowReport:
        """Prepare the rows of a part and write them to `path`; what became of each."""
        report = RowReport(rows=len(rows))
        # 1. Rows to conversations.
        places: list[str] = []
        examples: list[ChatExample] = []
        for place, raw in rows:
            try:
                read = conversation(raw, data)
            except Unusable as reason:
                report.drop(place, reason.reason, reason.what)
                continue
            if read is None:
                report.filtered += 1
                continue
            example, form = read
            report.forms[form] += 1
            places.append(place)
            examples.append(example)
        # 2. Conversations to token ids and chunks.
        if data not in self._preparers:
            made = self._request.preparer(data, self._student, self._teacher)
            self._preparers[data] = made
        preparer = self._preparers[data]
        preparer.counts = Counter()
        kept = []
        for place, prepared in zip(places, preparer(examples), strict=True):
            if isinstance(prepared, Unusable):
                report.drop(place, prepared.reason, prepared.what)
            else:
                kept.append(prepared)
        # 3. Sums for the report.
        counts = Counter(preparer.counts)
        for example in kept:
            ids, teacher_ids, maskable = example.student_ids, example.teacher_ids, example.maskable
            counts["student_tokens"] += len(ids)
            counts["teacher_tokens"] += len(ids if teacher_ids is None else teacher_ids)
            counts["maskable"] += len(maskable)
            pairs = maskable if example.pairs is None else example.pairs
            counts["chunks"] += len(pairs if example.shared else example.chunks)
            counts["turns"] += len(example.spans)
            report.lengths[str(-(-len(ids) // _LENGTH_STEP) * _LENGTH_STEP)] += 1
        report.kept, report.counts = len(kept), counts
        write_part(path, kept, report)
        return report


_worker: Worker | None = None


def _start_process(request: PrepareRequest, parent: int) -> None:
    """What a process of the pool does first."""
    serve_parent(parent)
    global _worker  # noqa: PLW0603 - a process has one worker for its whole life
    _worker = Worker(request)


def _prepare_in_process(rows: Rows, data: DataConfig, path: Path) -> RowReport:
    assert _worker is not None
    return _worker.prepare(rows, data, path)


def _plain(row: dict[str, Any]) -> bytes:
    text = json.dumps(row, ensure_ascii=False, sort_keys=True, default=str)
    return text.encode("utf-8", "surrogatepass")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
