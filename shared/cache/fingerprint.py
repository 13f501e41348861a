"""All that a cache's values depend on, as types: what `manifest.json` holds under "fingerprint".

A manifest is read by every command and may come from anywhere: ranges are checked on building.
"""

import dataclasses
import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from shared.cache.row import SCHEMA_VERSION
from shared.settings.build import strict, to_plain
from shared.settings.config import MOST_CLASSES, CacheConfig
from shared.settings.data import LengthConfig

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
                values[field.name] = (
                    value.to_json() if isinstance(value, _Part) else to_plain(value)
                )
        return values


@strict
class CachedTeacher(_Part):
    name: Name
    architecture: Name
    attention: dict[str, str | int]
    shift: bool
    student_tokens: bool
    """Whether it reads the student's very ids."""
    mask_id: TokenId
    vocabulary: Size
    """Rows of its embedding."""
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
    date: Name | None
    """What the templates took for today; None where none of them asks."""
    merged_from: tuple[dict[str, Any], ...] = ()


@strict
class CachedNoise(_Part):
    """`NoiseConfig` without the number of draws: a cache may grow."""

    seed: int
    comp_demo: bool
    demo_ratio: Annotated[float, Field(ge=0, le=1)]


@strict
class CachedTargets(_Part):
    signals: Annotated[tuple[Literal["topk", "chunks"], ...], Field(min_length=1, max_length=2)]
    k: Annotated[int, Field(ge=0, lt=1 << 26)]
    mass: Annotated[float, Field(gt=0, le=1)]
    temperatures: Annotated[tuple[Temperature, ...], Field(min_length=1, max_length=64)]
    """Rising, with 1.0."""
    tail: Literal["prior", "student"]
    classes: Annotated[int, Field(ge=1, le=MOST_CLASSES)]
    classes_from: Name | None
    pilot: Annotated[int, Field(ge=0)]
    values: Literal["levels", "float32"]
    positions: Literal["content", "response"] = "response"
    teacher_text: Literal["student", "own"] = "student"
    partial: bool = False
    """Whether a teacher that reads the student's ids may have been read at fewer positions than are
    masked: its text, with a prompt's unshared tokens spelled out, may be cut.
    """


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
    """Digest of the vocabulary's tables; None without top-k, or before they are made."""
    engine: CachedEngine
    pruned_from: dict[str, int] | None = None

    @classmethod
    def of(
        cls,
        config: CacheConfig,
        teacher: CachedTeacher,
        student: CachedStudent,
        data: CachedData,
        classes_from: str | None = None,
    ) -> "Fingerprint":
        """From settings whose `auto`s are decided, and what was opened. The tables are made later.

        `classes_from`: the digest of the checkpoint that `targets.classes_from` names.
        """
        noise, targets, engine = config.noise, config.targets, config.engine
        whole = {"k": 0, "mass": 1.0, "tail": "student", "classes": 1, "pilot": 0}
        topk = {name: getattr(targets, name) for name in whole}
        kept = CachedTargets(
            signals=targets.signals,
            temperatures=targets.stored_temperatures,
            values=targets.values,
            classes_from=classes_from if "topk" in targets.signals else None,
            **(topk if "topk" in targets.signals else whole),
        )
        if teacher.student_tokens:
            kept = dataclasses.replace(
                kept,
                positions=targets.positions,
                teacher_text=targets.teacher_text,
                partial=targets.teacher_text == "own"
                or targets.positions == "content"
                or config.lengths.teacher < 2 * config.lengths.student,
            )
        return cls(
            schema=SCHEMA_VERSION,
            teacher=teacher,
            student=student,
            data=data,
            lengths=config.lengths,
            noise=CachedNoise(noise.seed, noise.comp_demo, noise.demo_ratio),
            targets=kept,
            tables=None,
            engine=CachedEngine(engine.type, engine.dtype, engine.quantization),
        )

    @property
    def digest(self) -> str:
        """A short hash, by which shards and runs name their cache."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Lines `place: old → new` for every leaf of two nested dicts that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted({*old, *new}):
            inner = f"{place}.{key}" if place else str(key)
            lines += differences(old.get(key, "absent"), new.get(key, "absent"), inner)
        return lines
    return [] if old == new else [f"{place}: {json.dumps(old)} → {json.dumps(new)}"]
