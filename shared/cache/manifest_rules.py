"""What the values of a manifest may be. A manifest is read by every command, and its checksum anyone can make anew."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt, StringConstraints, TypeAdapter, ValidationError

from shared.settings.config import MOST_CLASSES

_MOST_UNITS = 1_000_000
_Name = Annotated[str, StringConstraints(max_length=1000)]
_Id = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]
_Vocabulary = Annotated[StrictInt, Field(ge=1, lt=1 << 26)]
_Temperature = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


_Tokens = Annotated[StrictInt, Field(ge=1, lt=1 << 24)]


@dataclass(frozen=True)
class _Lengths:
    student: _Tokens
    teacher: _Tokens
    block: _Tokens


@dataclass(frozen=True)
class _Data:
    content: _Name
    examples: Annotated[StrictInt, Field(ge=0)]


@dataclass(frozen=True)
class _Teacher:
    name: _Name
    architecture: _Name
    attention: dict[str, Any]
    mask_id: _Id
    shift: StrictBool
    student_tokens: StrictBool
    tokenizer: _Name
    vocabulary: _Vocabulary


@dataclass(frozen=True)
class _Student:
    mask_id: _Id
    tokenizer: _Name
    vocabulary: _Vocabulary


@dataclass(frozen=True)
class _Targets:
    k: Annotated[StrictInt, Field(ge=0, lt=1 << 26)]
    classes: Annotated[StrictInt, Field(ge=1, le=MOST_CLASSES)]
    mass: Annotated[float, Field(gt=0, le=1)]
    signals: Annotated[list[Literal["topk", "chunks"]], Field(min_length=1, max_length=2)]
    temperatures: Annotated[list[_Temperature], Field(min_length=1, max_length=64)]
    tail: Literal["prior", "student"]
    values: Literal["levels", "float32"]
    partial: StrictBool = False


@dataclass(frozen=True)
class _Noise:
    seed: StrictInt
    comp_demo: StrictBool
    demo_ratio: Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class _Engine:
    type: _Name
    dtype: _Name


@dataclass(frozen=True)
class _Fingerprint:
    data: _Data
    engine: _Engine
    lengths: _Lengths
    noise: _Noise
    student: _Student
    targets: _Targets
    teacher: _Teacher
    tables: _Name | None = None


@dataclass(frozen=True)
class _Manifest:
    fingerprint: _Fingerprint
    draws: Annotated[StrictInt, Field(ge=1, le=100)]
    parts: Annotated[StrictInt, Field(ge=0)]
    examples: Annotated[StrictInt, Field(ge=0, lt=1 << 50)]
    sources: Annotated[list[_Name], Field(max_length=1000)] = field(default_factory=list)


def problem_in(manifest: dict[str, Any]) -> str | None:
    """The first thing in a manifest's values that cannot be; None where all can."""
    try:
        found = TypeAdapter(_Manifest).validate_python(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    if found.parts > found.examples or found.draws * found.parts > _MOST_UNITS:
        return (
            f"{found.draws} draws of {found.parts} parts of {found.examples} examples are no cache"
        )
    if found.parts == 0 and found.examples > 0:
        return f"{found.examples} examples are in no part"
    return None
