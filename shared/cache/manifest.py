"""The cache's manifest: what it is, and the fingerprint of all that its values depend on.

A cache may grow (more draws) but never mix: another fingerprint is refused with a diff. A manifest
is read by every command and may come from anywhere: ranges are checked on building.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from shared.cache.row import SCHEMA_VERSION, Layout
from shared.cache.shards import Unit, finished_units, load_tables
from shared.settings.build import build, differences, require, strict, to_plain
from shared.settings.config import CacheConfig
from shared.settings.data import LengthConfig
from shared.system.files import TideError, read_json, write_bytes

MANIFEST = "manifest.json"
_MOST_UNITS = 1_000_000
Name = Annotated[str, StringConstraints(max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Size = Annotated[int, Field(ge=1, lt=1 << 26)]
Temperature = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


class _Part:
    def to_json(self) -> dict[str, Any]:
        """As nested dicts. A field that has a default is written only where it differs from it."""
        values = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value != field.default:
                plain = value.to_json() if isinstance(value, _Part) else to_plain(value)
                values[field.name] = plain
        return values


@strict
class CachedTeacher(_Part):
    name: Name
    architecture: Name
    attention: dict[str, str | int]
    shift: bool
    student_tokens: bool  # whether it reads the student's very ids
    mask_id: TokenId
    vocabulary: Size  # rows of its embedding
    weights: Name
    tokenizer: Name
    template: str


@strict
class CachedStudent(_Part):
    tokenizer: Name
    template: str
    mask_id: TokenId
    mask_token: Name
    vocabulary: Size


@strict
class CachedData(_Part):
    content: Name
    examples: Annotated[int, Field(ge=0, lt=1 << 50)]
    shard_examples: Annotated[int, Field(ge=1)]
    turns: tuple[Name, ...]
    date: Name | None  # what the templates took for today; None where none of them asks
    merged_from: tuple[dict[str, Any], ...] = ()


@strict
class CachedNoise(_Part):
    """`NoiseConfig` without the number of draws: a cache may grow."""

    seed: int
    comp_demo: bool
    demo_ratio: Annotated[float, Field(ge=0, le=1)]
    whole_chunks: bool = True


@strict
class CachedTargets(_Part):
    signals: Annotated[tuple[Literal["topk", "chunks"], ...], Field(min_length=1, max_length=2)]
    k: Annotated[int, Field(ge=0, lt=1 << 26)]
    mass: Annotated[float, Field(gt=0, le=1)]
    temperatures: Annotated[tuple[Temperature, ...], Field(min_length=1, max_length=64)]
    rank: Annotated[int, Field(ge=0, lt=1 << 15)] | None
    """Coefficients of the tail; None: as many as the pilot asks for."""
    step: Annotated[float, Field(ge=0, le=100)]
    pilot: Annotated[int, Field(ge=0)] | None
    values: Literal["levels", "float32"]
    positions: Literal["content", "response"] = "response"
    teacher_text: Literal["student", "own"] = "student"
    partial: bool = False
    """Whether a teacher of the student's tokens may have been read at fewer positions than are
    masked: its text, with a prompt's unshared tokens spelled out, may be cut."""


@strict
class CachedEngine(_Part):
    type: Name
    dtype: Name
    quantization: Name | None


@strict
class Fingerprint(_Part):
    """Two caches with the same fingerprint hold the same values, or parts of them."""

    schema: int
    teacher: CachedTeacher
    student: CachedStudent
    data: CachedData
    lengths: LengthConfig
    noise: CachedNoise
    targets: CachedTargets
    tables: Name | None
    """Digest of the tables; None without top-k, or before they are made."""
    engine: CachedEngine
    pruned_from: dict[str, int] | None = None

    @classmethod
    def of(
        cls, config: CacheConfig, teacher: CachedTeacher, student: CachedStudent, data: CachedData
    ) -> "Fingerprint":
        """From settings whose `auto`s are decided, and what was opened. Tables are made later."""
        noise, targets, engine = config.noise, config.targets, config.engine
        # What says nothing without a top-k, and what a teacher of other tokens has not.
        topk: dict[str, Any] = {"k": 0, "mass": 1.0, "rank": 0, "step": 0.0, "pilot": 0}
        if "topk" in targets.signals:
            topk = {name: getattr(targets, name) for name in topk}
        same_tokens: dict[str, Any] = {}
        if teacher.student_tokens:
            same_tokens = {"positions": targets.positions, "teacher_text": targets.teacher_text}
            whole = same_tokens == {"positions": "response", "teacher_text": "student"}
            short = config.lengths.teacher < 2 * config.lengths.student
            same_tokens["partial"] = short or not whole
        kept = CachedTargets(
            signals=targets.signals,
            temperatures=targets.stored_temperatures,
            values=targets.values,
            **topk,
            **same_tokens,
        )
        whole = noise.whole_chunks or teacher.student_tokens
        demo = CachedNoise(noise.seed, noise.comp_demo, noise.demo_ratio, whole)
        by = CachedEngine(engine.type, engine.dtype, engine.quantization)
        made = cls(SCHEMA_VERSION, teacher, student, data, config.lengths, demo, kept, None, by)
        return build(cls, made.to_json(), "a cache")  # what no command could read is not begun

    @property
    def digest(self) -> str:
        """A short hash, by which shards and runs name their cache."""
        return checksum_of(self.to_json())[:16]


@strict
class Manifest:
    """Every leaf of `fingerprint` is compared. The rest describes, and `draws` may grow."""

    fingerprint: Fingerprint
    draws: Annotated[int, Field(ge=1, le=100)]
    parts: Annotated[int, Field(ge=0)]
    examples: Annotated[int, Field(ge=0, lt=1 << 50)]
    schema_version: int = SCHEMA_VERSION
    sources: Annotated[tuple[Name, ...], Field(max_length=1000)] = ()
    """Names of the data, for people: of a file the name alone."""

    def __post_init__(self) -> None:
        size = f"{self.draws} draws of {self.parts} parts of {self.examples} examples"
        fits = self.parts <= self.examples and (self.parts > 0 or self.examples == 0)
        require(fits, f"{size} are no cache")
        require(self.draws * self.parts <= _MOST_UNITS, f"{size} are too many shards")

    @property
    def signals(self) -> tuple[str, ...]:
        return self.fingerprint.targets.signals

    @property
    def shared_tokenizer(self) -> bool:
        return self.fingerprint.teacher.student_tokens

    @property
    def digest(self) -> str:
        return self.fingerprint.digest

    def units(self) -> list[Unit]:
        """All units of a finished cache, draw by draw."""
        return [Unit(draw, part) for draw in range(self.draws) for part in range(self.parts)]

    def layout(self, cache: Path) -> Layout:
        """How the shards in `cache` are read. TideError where its tables are others."""
        digest, targets = self.fingerprint.tables, self.fingerprint.targets
        tables = None if digest is None else load_tables(cache, digest)
        return Layout(targets.temperatures, targets.values, tables, targets.partial)

    def to_json(self) -> dict[str, Any]:
        """As nested dicts, defaults and all."""
        plain = {"fingerprint": self.fingerprint.to_json(), "sources": list(self.sources)}
        return vars(self) | plain

    def save(self, cache: Path) -> None:
        """Write `manifest.json`, with a checksum over the rest; one that says the same stays."""
        values = self.to_json()
        values["checksum"] = checksum_of(values)
        content = (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
        path = cache / MANIFEST
        if not path.is_file() or path.read_bytes() != content:
            write_bytes(path, content)


def checksum_of(values: dict[str, Any]) -> str:
    """SHA-256 over nested dicts, such as all that a manifest says but its checksum."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_manifest(cache: Path) -> Manifest:
    """The manifest of a cache.

    TideError where there is none, or it is damaged or of another version.
    """
    path = cache / MANIFEST
    try:
        values = read_json(path)
        checksum = values.pop("checksum", None)
        version = values.get("schema_version")
        if not isinstance(version, int) or isinstance(version, bool) or not 0 < version < 1000:
            raise ValueError("its schema_version is no version")
        if version == SCHEMA_VERSION:
            if checksum != checksum_of(values):
                raise ValueError("its checksum does not hold")
            manifest = build(Manifest, values, str(path))
            if checksum != checksum_of(manifest.to_json()):  # such as "8" where 8 belongs
                raise ValueError("it has values of the wrong type")
            if not (cache / "draw=00").exists():
                return manifest
    except FileNotFoundError as error:
        fix = "build one with `tide cache`, or check the path"
        raise TideError(f"{cache} is no cache: it has no {MANIFEST}", fix=fix) from error
    except (TypeError, ValueError, AttributeError, OSError) as error:
        problem = error.what if isinstance(error, TideError) else str(error)
        fix = f"delete {path} and run the same `tide cache` command again; shards are kept"
        raise TideError(f"{path} is damaged: {problem[:500]}", fix=fix) from error
    if version == SCHEMA_VERSION:
        what = f"the shards of {cache} lie beside its manifest, where earlier versions wrote them"
        move = f"mkdir {cache}/shards; mv {cache}/draw=* {cache}/shards/"
        raise TideError(what, expected=f"them in {cache}/shards, as they are", fix=move)
    raise TideError(
        f"{cache} was written in schema version {version}",
        expected=f"version {SCHEMA_VERSION}",
        fix="build it again with `tide cache`, or use the version of this package that wrote it",
    )


def refuse_unfinished(
    cache: Path, manifest: Manifest, there: Collection[Unit] | None = None
) -> None:
    """TideError where a shard of the cache is not among those that are `there`: on disk."""
    units = manifest.units()
    missing = sorted(set(units).difference(finished_units(cache) if there is None else there))
    if missing:
        raise TideError(
            f"{cache} lacks {len(missing)} of {len(units)} shards, the first is "
            f"{missing[0].path(cache)}",
            expected="a finished cache",
            fix="run the same `tide cache` command again: it computes what is missing",
        )


def check_fingerprint(
    cache: Path,
    old: Fingerprint | Manifest,
    new: Fingerprint | Manifest,
    purpose: str,
    fix: str = "give back the old settings, or choose another folder (--out)",
) -> None:
    """TideError with a diff where `new` differs from what the cache is, `old`."""
    lines = differences(old.to_json(), new.to_json())
    if lines:
        what = f"{cache} was made with other settings (cache → now):\n    " + "\n    ".join(lines)
        raise TideError(what, expected=f"the settings of the cache, to {purpose}", fix=fix)
