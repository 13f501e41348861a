"""Sources in, prepared data out. Once for any number of caches; stopped and run again, it goes on.

A source is cut into parts of a fixed number of rows. A part that is not there yet is prepared, in
processes where there are many, and found again by its name ever after.
"""

import datetime
import hashlib
import json
import multiprocessing
import os
import platform
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from shared.aligned.examples import Prepared, Preparer, SharedVocabulary
from shared.data.conversation import conversation, copies
from shared.data.reading import refuse_bad_rows
from shared.data.sources import Place, Raw, source_files, source_rows
from shared.data.stdlib_corpus import corpus_origin
from shared.settings.build import to_plain
from shared.settings.config import DataConfig, LengthConfig
from shared.system.files import TideError, Unusable
from shared.system.processes import hold, serve_parent
from shared.text.tokenizers import Tokenizer
from teacher_cache.prepared import folder
from teacher_cache.prepared.folder import Entries, PreparedData, Record, RowReport

_VERSION = 5  # of what preparing does, and of the layout: another one prepares anew
_ROWS_OF_A_PART = 256
_PARTS_HERE = 12  # so few new parts are prepared here: starting processes would take longer
_LENGTH_STEP = 32  # of the histogram of lengths, in tokens

Rows = Sequence[tuple[Place, Raw]]


@dataclass(frozen=True)
class PrepareRequest:
    """What is to be prepared, how, and where. All but the rows that the outcome depends on.

    `identity` tells these tokenizers and templates from others; `student` and `teacher` are their
    folders, `templates` files that replace their templates. `shared`: the teacher reads the
    student's ids. `date`: what templates take for today.
    `positions`, `own_text` and `skip_first` are those of `Preparer`. `workers` 0: one a processor.
    """

    sources: tuple[DataConfig, ...]
    folder: Path
    identity: dict[str, Any] = field(hash=False)
    student: str
    teacher: str
    shared: bool
    student_mask_id: int
    teacher_mask_id: int
    lengths: LengthConfig
    templates: tuple[Path | None, Path | None] = (None, None)
    date: datetime.date | None = None
    positions: Literal["content", "response"] = "response"
    own_text: bool = False
    skip_first: bool = False
    dedup: bool = False
    workers: int = 0

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that an example depends on beside its row."""
        own = {name: getattr(self, name) for name in ("skip_first", "positions", "own_text")}
        own |= {"version": _VERSION, "date": str(self.date), "lengths": to_plain(self.lengths)}
        return {**self.identity, **own}


def prepare(request: PrepareRequest) -> PreparedData:
    """The prepared data that `request` describes; computed where it is not there yet.

    TideError where a source cannot be read, where more rows cannot be used than is allowed, and
    where none can be.
    """
    stamps: list[Any] = []  # what tells, without reading it, whether a source is what it was
    for data in request.sources:
        stats = [(str(file), file.stat()) for file in source_files(data.source)]
        stamps.append([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
        if data.source.startswith("stdlib:"):
            stamps[-1] = platform.python_version()
    name = _digest([request.settings, to_plain(request.sources), request.dedup])[:16]
    with hold(request.folder / ".lock", f"the prepared data in {request.folder}", wait=True):
        prepared = PreparedData.load(request.folder, name, stamps)
        if prepared is None:
            prepared = _prepare(request, stamps)
            prepared.save(name)
    folder.warn(prepared)
    return prepared


def _prepare(request: PrepareRequest, stamps: list[Any]) -> PreparedData:
    selector = Selector(request.dedup)
    names: list[str] = []
    reports: list[RowReport] = []
    context = multiprocessing.get_context("spawn")  # a model's threads do not survive a fork
    processes = request.workers or os.cpu_count() or 1
    with (
        ProcessPoolExecutor(processes, context, _start_process, (os.getpid(),)) as pool,
        tqdm(unit="row", desc="prepare", dynamic_ncols=True) as bar,
    ):
        for data in request.sources:
            of_here = f" ({corpus_origin()})" if data.source.startswith("stdlib:") else ""
            report = RowReport(data.source + of_here)
            reports.append(report)
            selector.sources.append([])
            for name, (part, keys) in _parts(request, data, pool, processes):
                bar.update(part.rows)
                report.add(part)
                names.append(name)
                if report.bad > max(1000, report.rows / 2):
                    _refuse_bad_rows(data, report)  # rows to come are not likely to mend it
                if not selector.take(len(names) - 1, keys, data):
                    break
            _refuse_bad_rows(data, report)
            report.taken = len(selector.sources[-1])
    entries, content = selector.finish()
    record = Record(stamps, names, content, selector.duplicates, reports, request.shared)
    prepared = PreparedData(request.folder, record, entries)
    if not len(entries):
        raise TideError(
            f"the data have no examples that fit:\n{folder.describe(prepared)}",
            expected="conversations with prompts shorter than lengths.student and lengths.teacher",
            fix="check the file given as --data, raise the lengths, or mend the filters",
        )
    return prepared


def _refuse_bad_rows(data: DataConfig, report: RowReport) -> None:
    places: list[str] = []
    for reason, some in report.places.items():
        if reason not in folder.NOT_BAD:
            places += map(": ".join, some)
    refuse_bad_rows(data, report.bad, report.rows, places)


@dataclass
class Selector:
    """Which prepared examples are taken, and in what order: weights, limits, repeats, and several
    sources interleaved. `sources` has for each what is taken: part, row, occurrence, key.
    """

    dedup: bool
    duplicates: int = 0
    sources: list[list[tuple[int, int, int, str]]] = field(default_factory=list)
    _seen: Counter[int] = field(default_factory=Counter)

    def take(self, part: int, keys: Sequence[str], config: DataConfig) -> bool:
        """Take for the last source what its weight and limit allow of a part's examples; False at
        the limit.
        """
        mine = self.sources[-1]
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

    def finish(self) -> tuple[Entries, str]:
        """All examples, the sources interleaved evenly, each in its own order; and a hash of their
        contents.
        """
        places = [(np.arange(len(mine)) + 0.5) / max(1, len(mine)) for mine in self.sources]
        examples = [example for mine in self.sources for example in mine]
        examples = [examples[i] for i in np.argsort(np.concatenate(places), kind="stable").tolist()]
        digest = hashlib.sha256()
        for _, _, occurrence, key in examples:
            digest.update(f"{key}#{occurrence}\n".encode())
        entries = np.array([example[:3] for example in examples], np.int32).reshape(-1, 3)
        return entries, digest.hexdigest()[:32]


Part = tuple[RowReport, list[str]]  # what became of its rows, and its examples' keys


def _parts(
    request: PrepareRequest, data: DataConfig, pool: ProcessPoolExecutor, processes: int
) -> Iterator[tuple[str, Part]]:
    """Every part of a source in order, with its name. Where more than a few are new, the pool
    prepares them.
    """
    later = ("limit", "weight", "allow_bad_rows")  # of no matter to a row by itself
    own = {name: value for name, value in to_plain(data).items() if name not in later}
    new = 0
    waiting: deque[tuple[str, Callable[[], Part]]] = deque()
    stream = iter(source_rows(data.source))
    while rows := list(islice(stream, _ROWS_OF_A_PART)):
        # 1. The name: what the part is made from.
        content = hashlib.sha256()
        for place, raw in rows:
            if isinstance(raw, bytes):
                row = raw
            else:
                text = json.dumps(raw, ensure_ascii=False, sort_keys=True, default=str)
                row = text.encode("utf-8", "surrogatepass")
            content.update(f"{place}\0{len(row)}\0".encode("utf-8", "surrogatepass") + row)
        name = _digest([request.settings, own, content.hexdigest()])[:24]
        # 2. Read, prepared here, or begun in another process.
        path = folder.part_path(request.folder, name)
        new += not path.exists()
        if path.exists():
            waiting.append((name, partial(folder.read_summary, path)))
        elif new <= _PARTS_HERE or processes == 1:
            waiting.append((name, partial(_prepare_part, request, rows, data, path)))
        else:
            waiting.append((name, pool.submit(_prepare_part, request, rows, data, path).result))
        # 3. In order, some parts ahead.
        while len(waiting) > (2 * processes if new > _PARTS_HERE else 0):
            name, wait = waiting.popleft()
            yield name, wait()
    for name, wait in waiting:
        yield name, wait()


def _prepare_part(request: PrepareRequest, rows: Rows, data: DataConfig, path: Path) -> Part:
    """Prepare the rows of a part and write them to `path`; what became of each."""
    report = RowReport(rows=len(rows))
    # 1. Rows to conversations.
    places, examples = [], []
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
    counts = Counter(f"not read: {name}" for example in examples for name in example.unread)
    preparer = replace(_preparer(request), turns=data.turns, counts=counts)
    kept: list[Prepared] = []
    for place, prepared in zip(places, preparer(examples), strict=True):
        if isinstance(prepared, Unusable):
            report.drop(place, prepared.reason, prepared.what)
        else:
            kept.append(prepared)
    # 3. Sums for the report.
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
    folder.write_part(path, kept, report)
    return report, [example.id for example in kept]


@lru_cache(maxsize=1)
def _preparer(request: PrepareRequest) -> Preparer:
    """What turns conversations into examples: a process loads the tokenizers once."""
    folders = (request.student, request.teacher)
    sides = zip(folders, request.templates, strict=True)
    student, own = (Tokenizer.load(side, request.date, template) for side, template in sides)
    return Preparer(
        student,
        SharedVocabulary.between(student, own) if request.shared else own,
        request.lengths,
        request.student_mask_id,
        request.teacher_mask_id,
        positions=request.positions,
        own_text=request.own_text,
        skip_first=request.skip_first,
    )


def _start_process(parent: int) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    serve_parent(parent)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
