"""Everything that can go wrong before the teacher is loaded: checked here, with what came and what was expected."""

from __future__ import annotations

import dataclasses
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import CacheConfig
from shared.data import DataSummary, scan
from shared.errors import TideError
from shared.examples import Preparer, SharedVocabulary
from shared.manifest import MANIFEST, Manifest, check_fingerprint, load_manifest
from shared.models.checkpoint import Checkpoint, open_checkpoint, resolve
from shared.schema import SCHEMA_VERSION
from shared.settings import to_plain
from shared.shards import Unit, finished_units, shard_counts
from shared.tokenizers import Tokenizer
from teacher_cache.checks import check_teacher
from teacher_cache.engines.settle import settle_engine
from teacher_cache.targets import TargetSpec
from teacher_cache.teachers.registry import TeacherEntry, find_teacher


@dataclass(frozen=True)
class CachePlan:
    """A checked stage-one run: what to compute, with what."""

    config: CacheConfig
    entry: TeacherEntry
    checkpoint: Checkpoint
    student: Tokenizer
    teacher: Tokenizer
    shared: SharedVocabulary | None
    """What both vocabularies share, where the teacher reads the student's ids; None across tokenizers."""
    data: DataSummary
    manifest: Manifest
    stored: frozenset[Unit] = frozenset()
    """Units that the store already has."""

    @property
    def missing(self) -> list[Unit]:
        """Units of this rank whose shards are not there yet, neither here nor in the store."""
        done = {*finished_units(self.config.out), *self.stored}
        mine = self.manifest.units()[self.config.rank :: self.config.world]
        return [unit for unit in mine if unit not in done]

    def examples_in(self, unit: Unit) -> int:
        """How many examples of the data belong to `unit`."""
        size = self.config.shard_examples
        return min(size, self.data.examples - unit.part * size)

    @property
    def longest_pass(self) -> int:
        """Tokens of the longest sequence that the teacher may be given."""
        lengths = self.config.lengths
        if self.shared is None:
            return lengths.teacher
        return 2 * lengths.student  # a prompt's unshared tokens are spelled out for the teacher

    def preparer(self) -> Preparer:
        """A fresh preparer, with counts of its own."""
        student_mask = self.manifest.fingerprint["student"]["mask_id"]
        if self.shared is not None:
            return Preparer(self.student, self.shared, self.config.lengths, student_mask)
        return Preparer(self.student, self.teacher, self.config.lengths, student_mask, self.entry.mask_id)

    def shared_ids(self) -> np.ndarray | None:
        """Ids that mean the same to student and teacher, bool[vocabulary]; None across tokenizers."""
        return None if self.shared is None else self.shared.same

    def target_spec(self) -> TargetSpec:
        """What to take of the logits."""
        targets = self.config.targets
        return TargetSpec(targets.k if "topk" in targets.signals else 0, targets.mass, targets.stored_temperatures)


def make_plan(config: CacheConfig, write: bool = True, engine: dict[str, Any] | None = None) -> CachePlan:
    """Check everything and write (or compare) the manifest. TideError names the first thing that is wrong.

    With `write` False the cache's folder is read only. `engine`: take this for the engine's part of the fingerprint,
    to look at a cache with another engine than it was made with.
    """
    config = settle_engine(config)
    entry = find_teacher(config.teacher, config.teachers_file)
    checkpoint = open_checkpoint(resolve(config.model or entry.model))
    teacher = Tokenizer.load(checkpoint.folder)
    student = Tokenizer.load(resolve(config.student_tokenizer or entry.student))
    check_teacher(config, entry, checkpoint, teacher)
    student_mask = _student_mask(student, config.student_mask_token)
    shared = _shared_vocabulary(student, teacher, config) if entry.student_tokens else None
    data = scan(config.data)
    fingerprint = _fingerprint(config, entry, checkpoint, student, teacher, student_mask, data)
    if engine is not None:
        fingerprint["engine"] = engine
    parts = -(-data.examples // config.shard_examples)
    manifest = Manifest(fingerprint, config.noise.draws, parts, data.examples)
    if (config.out / MANIFEST).exists():
        old = load_manifest(config.out)
        check_fingerprint(config.out, old, fingerprint, "go on with it")
        manifest = Manifest(fingerprint, max(old.draws, manifest.draws), parts, data.examples)
    elif units := finished_units(config.out):  # the manifest was lost: the shards say what they belong to
        for unit in units:
            shard_counts(unit.path(config.out), manifest.digest)
        manifest = dataclasses.replace(manifest, draws=max(manifest.draws, units[-1].draw + 1))
    if write:  # the tokenizers before the manifest: a cache with a manifest has them
        _save_tokenizer(student, config.out / "student_tokenizer")
        if not entry.student_tokens:
            _save_tokenizer(teacher, config.out / "teacher_tokenizer")
        manifest.save(config.out)
    return CachePlan(config, entry, checkpoint, student, teacher, shared, data, manifest)


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Whole or not at all: a library writes it, so it is written elsewhere and renamed."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as outer:
        half = Path(outer) / folder.name
        tokenizer.backend.save_pretrained(half)
        with suppress(OSError):  # another process, of another part of this cache, was first
            half.rename(folder)


def _student_mask(student: Tokenizer, mask_token: str) -> int:
    """Id of the student's mask token; one past the vocabulary where the token is still to be added at training."""
    if mask_token in student.backend.get_vocab():
        return student.special_id("mask", mask_token)
    return len(student)


def _shared_vocabulary(student: Tokenizer, teacher: Tokenizer, config: CacheConfig) -> SharedVocabulary:
    """What the two share. TideError unless all ordinary tokens are the same; added tokens may differ."""
    shared = SharedVocabulary.between(student, teacher)
    ordinary = [i for t in (student, teacher) for i in t.backend.get_vocab().values() if i not in t.added_ids]
    different = len(set(ordinary) - set(np.flatnonzero(shared.same).tolist()))
    if different:
        raise TideError(
            f"the tokenizers of teacher {config.teacher} and student {student.name} differ in {different} tokens",
            expected="vocabularies of one family, the same but for added tokens: this teacher reads the student's ids",
            fix="give the student that shares the teacher's tokenizer, or use a cross-tokenizer teacher",
        )
    return shared


def _fingerprint(
    config: CacheConfig,
    entry: TeacherEntry,
    checkpoint: Checkpoint,
    student: Tokenizer,
    teacher: Tokenizer,
    student_mask: int,
    data: DataSummary,
) -> dict[str, Any]:
    noise = to_plain(config.noise)
    noise.pop("draws")  # a cache may grow
    targets = to_plain(config.targets)
    targets["temperatures"] = list(config.targets.stored_temperatures)
    if "topk" not in config.targets.signals:
        targets |= {"k": 0, "mass": 1.0}
    return {
        "schema": SCHEMA_VERSION,
        "teacher": {
            "name": config.teacher,
            "architecture": entry.architecture,
            "attention": to_plain(entry.attention),
            "shift": entry.shift,
            "student_tokens": entry.student_tokens,
            "mask_id": entry.mask_id,
            "weights": checkpoint.fingerprint(),
            "tokenizer": teacher.fingerprint,
            "template": teacher.template.source,
        },
        "student": {
            "tokenizer": student.fingerprint,
            "template": student.template.source,
            "mask_id": student_mask,
            "mask_token": config.student_mask_token,
        },
        "data": {"content": data.content_hash, "examples": data.examples, "shard_examples": config.shard_examples},
        "lengths": to_plain(config.lengths),
        "noise": noise,
        "targets": targets,
        "engine": {
            "type": config.engine.type,
            "dtype": config.engine.dtype,
            "quantization": config.engine.quantization,
        },
    }
