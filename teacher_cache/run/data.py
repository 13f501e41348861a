"""The two sides of a cache, opened and checked, and its data as both need it. No weight is read."""

from __future__ import annotations

import datetime
import warnings
from dataclasses import dataclass

import numpy as np

from shared.aligned.examples import SharedVocabulary
from shared.cache.manifest import MANIFEST, load_manifest
from shared.models.checkpoint import Checkpoint, open_checkpoint, resolve
from shared.models.masks import student_mask
from shared.settings.config import CacheConfig
from shared.system.errors import TideError
from shared.text.tokenizers import Tokenizer
from teacher_cache.prepared.folder import PreparedData, totals
from teacher_cache.prepared.prepare import PrepareRequest, prepare
from teacher_cache.run.preflight import check_teacher
from teacher_cache.teachers.registry import TeacherEntry, find_teacher


@dataclass(frozen=True)
class Sides:
    """Teacher and student: the entry, the checkpoint's folder, both tokenizers, the student's mask."""

    entry: TeacherEntry
    checkpoint: Checkpoint
    teacher: Tokenizer
    student: Tokenizer
    mask_token: str
    student_mask: int
    shared: SharedVocabulary | None
    """What both vocabularies share, where the teacher reads the student's ids; None across tokenizers."""


def open_sides(config: CacheConfig, weights: bool = True) -> Sides:
    """Open and check both sides. `weights` False: those of a teacher on the hub are not fetched."""
    entry = find_teacher(config.teacher, config.teachers_file)
    checkpoint = open_checkpoint(resolve(config.model or entry.model), weights)
    teacher = Tokenizer.load(checkpoint.folder)
    student = Tokenizer.load(resolve(config.student_tokenizer or entry.student))
    check_teacher(config, entry, checkpoint, teacher)
    token, mask = student_mask(student, config.student_mask_token)
    shared = _shared_vocabulary(student, teacher, config) if entry.student_tokens else None
    _check_k(config, shared)
    return Sides(entry, checkpoint, teacher, student, token, mask, shared)


def _check_k(config: CacheConfig, shared: SharedVocabulary | None) -> None:
    if shared is None or "topk" not in config.targets.signals:
        return
    most = int(shared.same.sum())
    if config.targets.k > most:
        raise TideError(
            f"targets.k is {config.targets.k}, but teacher {config.teacher} and student share {most} tokens",
            expected=f"k between 1 and {most}",
            fix=f"lower it: --set targets.k={min(64, most)}",
        )


def prepare_data(config: CacheConfig, sides: Sides) -> tuple[PreparedData, datetime.date | None]:
    """The data as student and teacher need it, prepared where it is not yet, and what templates took for today.

    Noise, targets and engine have no part in it.
    """
    day, entry, student, teacher = _day(config, sides), sides.entry, sides.student, sides.teacher
    own_text = entry.student_tokens and config.targets.teacher_text == "own"
    reads_template = own_text or not entry.student_tokens
    identity = {
        "student": [student.fingerprint, student.template.source, sides.student_mask],
        "teacher": [
            teacher.fingerprint,
            teacher.template.source if reads_template else "",
            entry.mask_id,
        ],
        "shared": entry.student_tokens,
    }
    request = PrepareRequest(
        sources=config.sources,
        folder=config.prepared_folder,
        identity=identity,
        student=resolve(config.student_tokenizer or entry.student),
        teacher=str(sides.checkpoint.folder),
        shared=entry.student_tokens,
        student_mask_id=sides.student_mask,
        teacher_mask_id=entry.mask_id,
        lengths=config.lengths,
        date=day,
        positions=config.targets.positions if entry.student_tokens else "content",
        own_text=own_text,
        skip_first=entry.shift,
        dedup=config.dedup,
        workers=config.prepare_workers,
    )
    return prepare(request), day


def refuse_empty(data: PreparedData) -> None:
    """TideError where no example of the data can be used."""
    if data.examples == 0:
        raise TideError(
            f"none of the {totals(data.record.sources).get('rows', 0):,} rows of the data can be used",
            expected="at least one conversation with an answer",
            fix="look at what was left out, and why, with `tide prepare`",
        )


def check_alignment(config: CacheConfig, sides: Sides, data: PreparedData) -> None:
    """TideError where chunks are wanted and the two tokenizers share none; a warning where most bytes are in none."""
    if sides.shared is not None or "chunks" not in config.targets.signals:
        return
    sums = totals(data.record.sources)
    lost, whole = sums.get("unaligned_bytes", 0), sums.get("response_bytes", 0)
    if not sums.get("chunks"):
        raise TideError(
            f"teacher {config.teacher} and student {sides.student.name} share no chunk: {lost:,} of {whole:,} response "
            "bytes could not be aligned",
            expected="two tokenizers whose tokens spell the same bytes",
            fix="look at `tide prepare --show 3`, and choose another student tokenizer or teacher",
        )
    if lost > whole / 2:
        warnings.warn(
            f"{lost / whole:.0%} of the response bytes could not be aligned between teacher and student: these are "
            "trained by cross-entropy alone",
            stacklevel=2,
        )


def _day(config: CacheConfig, sides: Sides) -> datetime.date | None:
    """What templates take for today: the day on which the cache was begun. None where no template asks."""
    if not (sides.student.template.knows_today or sides.teacher.template.knows_today):
        return None
    if (config.out / MANIFEST).exists():
        begun = load_manifest(config.out).fingerprint.data.date
        if begun is not None:
            return datetime.date.fromisoformat(begun)
    return datetime.date.today()


def _shared_vocabulary(
    student: Tokenizer, teacher: Tokenizer, config: CacheConfig
) -> SharedVocabulary:
    """What the two share. TideError unless all ordinary tokens are the same; added tokens may differ."""
    shared = SharedVocabulary.between(student, teacher)
    ordinary = [
        i
        for t in (student, teacher)
        for i in t.backend.get_vocab().values()
        if i not in t.added_ids
    ]
    different = len(set(ordinary) - set(np.flatnonzero(shared.same).tolist()))
    if different:
        raise TideError(
            f"the tokenizers of teacher {config.teacher} and student {student.name} differ in {different} tokens",
            expected="vocabularies of one family, the same but for added tokens: this teacher reads the student's ids",
            fix="give the student that shares the teacher's tokenizer, or use a cross-tokenizer teacher",
        )
    return shared
