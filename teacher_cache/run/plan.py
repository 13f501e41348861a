"""Everything that can go wrong before the teacher is loaded: checked here, with what came and what was expected."""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.aligned.examples import SharedVocabulary
from shared.cache.fingerprint import (
    CachedData,
    CachedEngine,
    CachedStudent,
    CachedTeacher,
    Fingerprint,
)
from shared.cache.manifest import MANIFEST, Manifest, check_fingerprint, load_manifest
from shared.cache.row import Layout
from shared.cache.shards import Unit, finished_units, read_table, refuse_other_cache
from shared.cache.vocabulary import Vocabulary, has_tables, load_vocabulary
from shared.data.sources import public_name
from shared.models.checkpoint import Checkpoint, open_checkpoint, resolve
from shared.settings.build import to_plain
from shared.settings.config import CacheConfig
from shared.system.atomic import new_folder
from shared.text.tokenizers import Tokenizer
from teacher_cache.method.targets import TargetSpec
from teacher_cache.prepared.folder import PreparedData
from teacher_cache.run.data import Sides, check_alignment, open_sides, prepare_data, refuse_empty
from teacher_cache.run.places import check_places
from teacher_cache.run.resolve_auto import settle_engine
from teacher_cache.teachers.registry import Full, TeacherEntry


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
    data: PreparedData
    manifest: Manifest
    """Complete once the tables are there (`tables.settle`)."""
    vocabulary: Vocabulary | None = None
    stored: frozenset[Unit] = frozenset()
    """Units that the store already has."""

    @property
    def missing(self) -> list[Unit]:
        """Units of this rank whose shards are not there yet, neither here nor in the store."""
        done = {*finished_units(self.config.out), *self.stored}
        rank, world = self.config.rank, self.config.world
        units = self.manifest.units()
        # Where passes share a clean copy all draws of a part are one rank's.
        alone = isinstance(self.entry.attention, Full)
        mine = (
            units[rank::world] if alone else [unit for unit in units if unit.part % world == rank]
        )
        return [unit for unit in mine if unit not in done]

    def examples_in(self, unit: Unit) -> int:
        """How many examples of the data belong to `unit`."""
        size = self.config.shard_examples
        return min(size, self.data.examples - unit.part * size)

    @property
    def longest_pass(self) -> int:
        """Tokens of the longest sequence that the teacher may be given."""
        return self.config.lengths.teacher

    def shared_ids(self) -> np.ndarray | None:
        """Ids that mean the same to student and teacher, bool[vocabulary]; None across tokenizers."""
        return None if self.shared is None else self.shared.same

    @property
    def wants_tables(self) -> bool:
        """Whether the shards need what is known of the vocabulary as a whole."""
        return "topk" in self.config.targets.signals

    @property
    def layout(self) -> Layout:
        """How the shards are written."""
        targets = self.config.targets
        return Layout(
            targets.stored_temperatures,
            targets.values,
            self.vocabulary,
            self.manifest.fingerprint.targets.partial,
        )

    def target_spec(self) -> TargetSpec:
        """What to take of the logits."""
        targets = self.config.targets
        k = targets.k if self.wants_tables else 0
        return TargetSpec(k, targets.mass, targets.stored_temperatures, self.layout.classes)


def make_plan(
    config: CacheConfig, write: bool = True, engine: CachedEngine | None = None
) -> CachePlan:
    """Check everything, and the manifest that may be there. TideError names the first thing that is wrong.

    With `write` False the cache's folder is read only. `engine`: take this for the engine's part of the fingerprint,
    to look at a cache with another engine than it was made with.
    """
    check_places(config)
    config = settle_engine(config)
    sides = open_sides(config)
    entry, checkpoint, student, teacher = (
        sides.entry,
        sides.checkpoint,
        sides.student,
        sides.teacher,
    )
    data, day = prepare_data(config, sides)
    check_alignment(config, sides, data)
    refuse_empty(data)
    fingerprint = _fingerprint(config, sides, data, day)
    if engine is not None:
        fingerprint = dataclasses.replace(fingerprint, engine=engine)
    parts = -(-data.examples // config.shard_examples)
    names = tuple(dict.fromkeys(public_name(source.source) for source in config.sources))
    manifest = Manifest(fingerprint, config.noise.draws, parts, data.examples, sources=names)
    if (config.out / MANIFEST).exists():
        old = load_manifest(config.out)
        fingerprint = dataclasses.replace(fingerprint, tables=old.fingerprint.tables)
        check_fingerprint(config.out, old.fingerprint, fingerprint, "go on with it")
        draws = max(old.draws, manifest.draws)
        manifest = Manifest(fingerprint, draws, parts, data.examples, sources=old.sources or names)
    elif units := finished_units(
        config.out
    ):  # the manifest was lost: the shards say what they belong to
        if "topk" in config.targets.signals and has_tables(config.out):
            digest = load_vocabulary(config.out).digest
            fingerprint = dataclasses.replace(fingerprint, tables=digest)
            manifest = dataclasses.replace(manifest, fingerprint=fingerprint)
        for unit in units:
            path = unit.path(config.out)
            refuse_other_cache(path, read_table(path).counts, manifest.digest)
        manifest = dataclasses.replace(manifest, draws=max(manifest.draws, units[-1].draw + 1))
    if write:  # the tokenizers before the manifest, which comes with the tables: a cache with a manifest has both
        _save_tokenizer(student, config.out / "student_tokenizer")
        if not entry.student_tokens:
            _save_tokenizer(teacher, config.out / "teacher_tokenizer")
    return CachePlan(config, entry, checkpoint, student, teacher, sides.shared, data, manifest)


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Whole or not at all: a library writes it, so it is written elsewhere and renamed."""
    if folder.exists():
        return
    with new_folder(folder) as half:
        tokenizer.backend.save_pretrained(half)


def _fingerprint(
    config: CacheConfig, sides: Sides, data: PreparedData, day: datetime.date | None
) -> Fingerprint:
    entry, student = sides.entry, sides.student
    classes_from = config.targets.classes_from
    if classes_from is not None:
        classes_from = open_checkpoint(resolve(classes_from)).fingerprint()
    return Fingerprint.of(
        config,
        CachedTeacher(
            name=config.teacher,
            architecture=entry.architecture,
            attention=to_plain(entry.attention),
            shift=entry.shift,
            student_tokens=entry.student_tokens,
            mask_id=entry.mask_id,
            vocabulary=sides.checkpoint.embedding_rows,
            weights=sides.checkpoint.fingerprint(),
            tokenizer=sides.teacher.fingerprint,
            template=sides.teacher.template.source,
        ),
        CachedStudent(
            tokenizer=student.fingerprint,
            template=student.template.source,
            mask_id=sides.student_mask,
            mask_token=sides.mask_token,
            vocabulary=max(len(student), sides.student_mask + 1),
        ),
        CachedData(
            content=data.record.content,
            examples=data.examples,
            shard_examples=config.shard_examples,
            turns=tuple(sorted({source.turns for source in config.sources})),
            date=None if day is None else str(day),
        ),
        classes_from,
    )
