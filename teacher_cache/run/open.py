"""The one opening of a cache: begin it, or go on with what is there.

Everything that can go wrong before the teacher is loaded goes wrong here: `auto`s are decided,
teacher, student and data opened, and what follows from them is compared with the manifest.
"""

import datetime
from dataclasses import dataclass, replace

import numpy as np

from shared.aligned.examples import SharedVocabulary
from shared.cache import manifest as cached
from shared.cache.manifest import Manifest
from shared.cache.row import Layout, Tables
from shared.cache.shards import Unit, finished_units, has_tables, load_tables, read_table
from shared.data.sources import public_name
from shared.models.checkpoint import Checkpoint, open_checkpoint, resolve, student_mask
from shared.settings.build import to_plain
from shared.settings.config import CacheConfig
from shared.system.files import TideError
from shared.text.tokenizers import Tokenizer
from teacher_cache.method import TargetSpec
from teacher_cache.prepared.folder import PreparedData
from teacher_cache.prepared.prepare import PrepareRequest, prepare
from teacher_cache.run.preflight import check_data, check_places, check_teacher, settle_engine
from teacher_cache.teachers.registry import Full, TeacherEntry, find_teacher


@dataclass(frozen=True)
class Sides:
    entry: TeacherEntry
    checkpoint: Checkpoint
    teacher: Tokenizer
    student: Tokenizer
    mask_token: str
    student_mask: int
    shared: SharedVocabulary | None
    """What both vocabularies share, where the teacher reads the student's ids; else None."""


def open_sides(config: CacheConfig, weights: bool = True) -> Sides:
    """Open and check both sides. `weights` False: those of a teacher on the hub are not fetched."""
    entry = find_teacher(config.teacher, config.teachers_file)
    checkpoint = open_checkpoint(resolve(config.model or entry.model), weights)
    teacher = Tokenizer.load(checkpoint.folder, chat_template=config.teacher_chat_template)
    place = resolve(config.student_tokenizer or entry.student)
    student = Tokenizer.load(place, chat_template=config.student_chat_template)
    check_teacher(config, entry, checkpoint, teacher)
    shared, usable = None, checkpoint.embedding_rows
    if entry.student_tokens:
        # The teacher reads the student's ids: only added tokens may differ.
        shared = SharedVocabulary.between(student, teacher)
        alike, different = set(np.flatnonzero(shared.same).tolist()), set()
        for side in (student, teacher):
            different |= set(side.backend.get_vocab().values()) - side.added_ids - alike
        if different:
            names = f"teacher {config.teacher} and student {student.name}"
            raise TideError(
                f"the tokenizers of {names} differ in {len(different)} tokens",
                expected="the same tokens but for added ones: this teacher reads the student's ids",
                fix="give the student that shares its tokenizer, or use a cross-tokenizer teacher",
            )
        usable = len(alike)
    if "topk" in config.targets.signals and config.targets.k > usable:
        what = f"targets.k is {config.targets.k}: {config.teacher} has {usable} that can be listed"
        fix = f"lower it: --set targets.k={min(64, usable)}"
        raise TideError(what, expected=f"k between 1 and {usable}", fix=fix)
    mask = student_mask(student, config.student_mask_token)
    return Sides(entry, checkpoint, teacher, student, *mask, shared)


def prepare_data(
    config: CacheConfig, sides: Sides, begun: Manifest | None = None
) -> tuple[PreparedData, datetime.date | None]:
    """The data as student and teacher need it, prepared where it is not yet, and what templates
    take for today: the day on which the cache was begun (its manifest), None where none asks.
    """
    entry, student, teacher = sides.entry, sides.student, sides.teacher
    shared, day = entry.student_tokens, None
    if student.template.knows_today or teacher.template.knows_today:
        date = begun and begun.fingerprint.data.date
        day = datetime.date.fromisoformat(date) if date else datetime.date.today()
    own_text = shared and config.targets.teacher_text == "own"
    template = teacher.template.source if own_text or not shared else ""
    identity = {
        "student": [student.fingerprint, student.template.source, sides.student_mask],
        "teacher": [teacher.fingerprint, template, entry.mask_id],
        "shared": shared,
    }
    request = PrepareRequest(
        sources=config.sources, folder=config.prepared_folder, identity=identity,
        student=resolve(config.student_tokenizer or entry.student),
        teacher=str(sides.checkpoint.folder), shared=shared, lengths=config.lengths, date=day,
        templates=(config.student_chat_template, config.teacher_chat_template),
        student_mask_id=sides.student_mask, teacher_mask_id=entry.mask_id, own_text=own_text,
        positions=config.targets.positions if shared else "content", skip_first=entry.shift,
        dedup=config.dedup, workers=config.prepare_workers,
    )  # fmt: skip
    return prepare(request), day


@dataclass(frozen=True)
class Run(Sides):
    """A checked run of stage one: what to compute, with what."""

    config: CacheConfig
    data: PreparedData
    manifest: Manifest
    """Complete once the tables are there (`tables.settle_tables`)."""
    tables: Tables | None = None
    stored: frozenset[Unit] = frozenset()
    """Units that the store already has."""

    @property
    def wants_tables(self) -> bool:
        """Whether the shards need what is known of the teacher as a whole."""
        return "topk" in self.config.targets.signals

    @property
    def layout(self) -> Layout:
        targets = self.manifest.fingerprint.targets
        return Layout(targets.temperatures, targets.values, self.tables, targets.partial)

    def target_spec(self) -> TargetSpec:
        targets = self.config.targets
        k = targets.k if self.wants_tables else 0
        return TargetSpec(k, targets.mass, targets.stored_temperatures, self.layout.rank)

    @property
    def missing(self) -> list[Unit]:
        """Units of this rank whose shards are not there yet, neither here nor in the store."""
        done = {*finished_units(self.config.out), *self.stored}
        rank, world, units = self.config.rank, self.config.world, self.manifest.units()
        if isinstance(self.entry.attention, Full):
            mine = units[rank::world]
        else:  # passes of all draws share a clean copy: a part is one rank's
            mine = [unit for unit in units if unit.part % world == rank]
        return [unit for unit in mine if unit not in done]

    def examples_in(self, unit: Unit) -> int:
        size = self.config.shard_examples
        return min(size, self.data.examples - unit.part * size)


def open_or_begin(config: CacheConfig, any_engine: bool = False) -> Run:
    """The run that `config` describes: a new one, or that of the cache at `config.out`. Nothing is
    written but prepared data. `any_engine`: look at a cache with another engine.
    """
    # 1. What is there decides what was left open.
    out = config.out
    check_places(config)
    begun = cached.load_manifest(out) if (out / cached.MANIFEST).exists() else None
    config = settle_engine(config, begun and begun.fingerprint.engine)
    # 2. Teacher, student and data.
    sides = open_sides(config)
    data, day = prepare_data(config, sides, begun)
    check_data(config, sides.shared is not None, data)
    # 3. All that the values depend on.
    entry, student, checkpoint = sides.entry, sides.student, sides.checkpoint
    teacher = cached.CachedTeacher(
        name=config.teacher, architecture=entry.architecture, attention=to_plain(entry.attention),
        shift=entry.shift, student_tokens=entry.student_tokens, mask_id=entry.mask_id,
        vocabulary=checkpoint.embedding_rows, weights=checkpoint.fingerprint(),
        tokenizer=sides.teacher.fingerprint, template=sides.teacher.template.source,
    )  # fmt: skip
    learner = cached.CachedStudent(
        tokenizer=student.fingerprint, template=student.template.source,
        mask_id=sides.student_mask, mask_token=sides.mask_token,
        vocabulary=max(len(student), sides.student_mask + 1),
    )  # fmt: skip
    turns = tuple(sorted({source.turns for source in config.sources}))
    date, size = None if day is None else str(day), config.shard_examples
    examples = cached.CachedData(data.record.content, data.examples, size, turns, date)
    fingerprint = cached.Fingerprint.of(config, teacher, learner, examples)
    # 4. The tables, where they are made already.
    digest, tables = begun and begun.fingerprint.tables, None
    if "topk" in config.targets.signals and has_tables(out):
        tables = load_tables(out, digest)
        digest = tables.digest
    fingerprint = replace(fingerprint, tables=digest)
    # 5. Begin, or go on.
    draws, parts = config.noise.draws, -(-data.examples // size)
    names = tuple(dict.fromkeys(public_name(source.source) for source in config.sources))
    if begun is not None:
        if any_engine:
            fingerprint = replace(fingerprint, engine=begun.fingerprint.engine)
        cached.check_fingerprint(out, begun.fingerprint, fingerprint, "go on with it")
        draws, names = max(begun.draws, draws), begun.sources or names
    elif units := finished_units(out):
        # The manifest was lost: the shards say what they belong to.
        for unit in units:
            read_table(unit.path(out), cache=fingerprint.digest)
        draws = max(draws, units[-1].draw + 1)
    manifest = Manifest(fingerprint, draws, parts, data.examples, sources=names)
    return Run(**vars(sides), config=config, data=data, manifest=manifest, tables=tables)
