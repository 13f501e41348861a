"""Settings as frozen dataclasses, made from TOML and `section.key=value` texts, and back.

@strict
class KL:
    type: Literal["kl"] = "kl"
    temperature: Positive = 2.0

Distillation = Annotated[NoDistillation | KL, BY_TYPE]  # TOML: { type = "kl", temperature = 2.0 }
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from shared.system.errors import TideError

T = TypeVar("T")
Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
BY_TYPE = Field(discriminator="type")  # of a union of variants: the class with this `type`


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def strict(cls: type[T]) -> type[T]:
    """A frozen dataclass; a name that it does not have is an error where it is built from TOML."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True)(cls)


def require(condition: bool, message: str) -> None:
    """ValueError with `message` where settings do not fit each other."""
    if not condition:
        raise ValueError(message)


def build(kind: type[T], values: Mapping[str, Any], where: str = "the configuration") -> T:
    """A config of type `kind` from nested dicts. TideError names every setting that is wrong."""
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        problems = []
        for item in error.errors():
            # a step with a space is the tag of a union, which no user wrote
            name = ".".join(str(step) for step in item["loc"] if " " not in str(step))
            match item["type"]:
                case "unexpected_keyword_argument":
                    near = advice(name.rpartition(".")[2], sorted(_setting_names(kind)))
                    problems.append(f"there is no setting {name}; {near}")
                case "value_error":  # of `require`
                    problems.append(
                        f"{name}: {item.get('ctx', {}).get('error')}".removeprefix(": ")
                    )
                case "missing":
                    problems.append(f"{name} is missing")
                case _:
                    expected = item["msg"].removeprefix("Input should be ")
                    problems.append(f"{name} is {item['input']!r:.80}, expected {expected}")
        raise TideError(
            f"invalid settings for {where}: {'; '.join(dict.fromkeys(problems))}",
            fix="correct the recipe or the --set option named above",
        ) from error


def _setting_names(kind: Any) -> set[str]:
    """The settings of all dataclasses that a type holds."""
    names: set[str] = set()
    parts = typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        fields = typing.get_type_hints(kind)
        names, parts = set(fields), tuple(fields.values())
    return names.union(*(_setting_names(part) for part in parts))


def advice(name: str, names: Sequence[str]) -> str:
    """Words that point to the nearest of `names`, or to all of them."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"


def read_toml(path: Path) -> dict[str, Any]:
    """The file's content; TideError where it is missing or no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what = f"cannot read {path}: {error.strerror}"
        raise TideError(what, expected="a TOML recipe") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        what = f"{path} is not TOML: {error}"
        raise TideError(what, fix="correct the line that it names") from error


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply `section.key=value` texts to nested tables; a number as key is a member of a list.
    The value is TOML, or a bare word taken as text.
    """
    for text in overrides:
        key, equals, raw = text.partition("=")
        path = key.strip().split(".")
        if not equals or path == [""]:
            expected = "section.key=value, such as noise.draws=4"
            raise TideError(f"{text!r} is no setting", expected=expected)
        try:
            value = tomllib.loads(f"v = {raw}")["v"]
        except tomllib.TOMLDecodeError:
            value = raw
        place: Any = values
        for depth, part in enumerate(path, 1):
            step: Any = part
            if isinstance(place, list):
                if not part.isdigit() or int(part) >= len(place):
                    raise TideError(
                        f"{key}: there is a list of {len(place)}, and {part} is no member of it",
                        expected=f"a number from 0 to {len(place) - 1}, as in data.0.limit=1000",
                        fix="or replace the list: --data SOURCE, or a recipe of your own",
                    )
                step = int(part)
            elif not isinstance(place, dict):
                raise TideError(f"{key}: {path[depth - 2]} is a value, not a section")
            if depth == len(path):
                place[step] = value
            else:
                place = place[step] if isinstance(place, list) else place.setdefault(step, {})


def to_plain(config: Any) -> Any:
    """A config as JSON-able dicts, for manifests and logs; `type` fields name the variants."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, list | tuple):
        return [to_plain(item) for item in config]
    return str(config) if isinstance(config, Path) else config
