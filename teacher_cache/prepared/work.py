"""One part of the data prepared: raw rows in, a file of examples out. A pure function, so it may run in any process."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.aligned.examples import Prepared, Preparer
from shared.aligned.same_tokens import SharedVocabulary
from shared.data.conversation import ChatExample
from shared.data.reading import conversation
from shared.data.selection import in_split
from shared.settings.config import DataConfig, LengthConfig
from shared.system.errors import Unusable
from shared.system.signals import serve_parent
from shared.text.tokenizers import Tokenizer
from teacher_cache.prepared.cutting import RawPart
from teacher_cache.prepared.parts import PartSummary, write_part

_BIN = 32
"""Width of the bins of the histogram of lengths, in tokens."""


@dataclass(frozen=True)
class Recipe:
    """All that preparing depends on beside the rows: folders of tokenizers, mask ids, lengths, the day of the
    templates.
    """

    student: str
    teacher: str
    shared: bool
    """The teacher reads the student's ids."""
    student_mask_id: int
    teacher_mask_id: int
    lengths: LengthConfig
    skip_first: bool
    """The teacher's rows predict the next token, so that it can say nothing of position 0."""
    date: datetime.date | None
    positions: Literal["content", "response"] = "response"
    own_text: bool = False

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


def prepare_part(part: RawPart, data: DataConfig, preparer: Preparer, path: Path) -> PartSummary:
    """Prepare the rows of `part` and write them to `path`; what became of each."""
    summary = PartSummary(rows=len(part.rows))
    examples: list[tuple[int, ChatExample]] = []
    for number, raw in enumerate(part.rows):
        try:
            found = conversation(raw, data)
        except Unusable as reason:
            summary.drop(number, reason.reason, reason.what)
            continue
        if found is None or not in_split(found[0].id, data):
            summary.filtered += 1
            continue
        example, form = found
        summary.forms[form] = summary.forms.get(form, 0) + 1
        examples.append((number, example))
    preparer.counts = Counter()
    kept = []
    for (number, example), result in zip(examples, preparer([e for _, e in examples]), strict=True):
        if isinstance(result, Unusable):
            summary.drop(number, result.reason, result.what)
            continue
        kept.append((example.id, number, result))
    _count(summary, [p for _, _, p in kept], preparer.counts)
    write_part(path, kept, summary)
    return summary


def _count(summary: PartSummary, kept: list[Prepared], lost: Counter[str]) -> None:
    counts = Counter(lost)
    lengths: Counter[str] = Counter()
    for example in kept:
        length = len(example.student_ids)
        counts["student_tokens"] += length
        counts["teacher_tokens"] += (
            length if example.teacher_ids is None else len(example.teacher_ids)
        )
        counts["maskable"] += len(example.maskable)
        pairs = example.maskable if example.pairs is None else example.pairs
        counts["chunks"] += len(pairs) if example.shared else len(example.chunks)
        counts["turns"] += len(example.spans)
        lengths[str(-(-length // _BIN) * _BIN)] += 1
    summary.kept, summary.counts, summary.lengths = len(kept), dict(counts), dict(lengths)


class Worker:
    """Preparing in a process of its own: tokenizers are loaded once."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._student = Tokenizer.load(recipe.student, recipe.date)
        self._teacher = Tokenizer.load(recipe.teacher, recipe.date)
        self._preparers: dict[DataConfig, Preparer] = {}

    def prepare(self, part: RawPart, data: DataConfig, path: Path) -> PartSummary:
        """`prepare_part` for a part of the source `data`."""
        if data not in self._preparers:
            self._preparers[data] = self._recipe.preparer(data, self._student, self._teacher)
        return prepare_part(part, data, self._preparers[data], path)


_worker: Worker | None = None


def start_worker(make: Callable[[], Worker], parent: int) -> None:
    """What a process of the pool does first."""
    serve_parent(parent)
    global _worker  # noqa: PLW0603 - a process has one worker for its whole life
    _worker = make()


def prepare_in_worker(part: RawPart, data: DataConfig, path: Path) -> PartSummary:
    """What a process of the pool is asked."""
    assert _worker is not None
    return _worker.prepare(part, data, path)
