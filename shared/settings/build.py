"""From TOML and `section.key=value` texts to configurations, and back to plain values for manifests."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from shared.settings.data import ONE, SEVERAL
from shared.settings.nearest import advice, names_at
from shared.system.errors import TideError

T = TypeVar("T")


def _explain(error: ValidationError, kind: Any, where: str) -> TideError:
    lines = []
    for item in error.errors():
        place = (
            ".".join(str(part) for part in item["loc"] if part not in (ONE, SEVERAL))
            or "the configuration"
        )
        reason = item["msg"]
        if item["type"] == "unexpected_keyword_argument":
            reason = (
                f"no such setting; {advice(str(item['loc'][-1]), names_at(kind, item['loc'][:-1]))}"
            )
        lines.append(f"{place}: {reason.removeprefix('Value error, ')}")
    return TideError(
        f"{where} does not hold: " + "; ".join(lines),
        fix="correct the recipe or the --set option named above",
    )


def build(kind: type[T], values: Mapping[str, Any], where: str = "the configuration") -> T:
    """Make a config of type `kind` from nested dicts. TideError names every setting that is wrong."""
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        raise _explain(error, kind, where) from error


def read_toml(path: Path) -> dict[str, Any]:
    """The file's content; TideError where it is missing or no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TideError(
            f"cannot read {path}: {error.strerror}", expected="a TOML recipe"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TideError(
            f"{path} is not TOML: {error}", fix="correct the line that it names"
        ) from error


def set_value(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b.c` in nested dicts; a number is a member of a list."""
    *path, last = key.split(".")
    place: Any = values
    for part in path:
        inner = _member(place, part, key) if isinstance(place, list) else place.setdefault(part, {})
        if not isinstance(inner, dict | list):
            raise TideError(f"{key}: {part} is a value, not a section")
        place = inner
    if isinstance(place, list):
        _member(place, last, key)
        place[int(last)] = value
    else:
        place[last] = value


def _member(items: list[Any], number: str, key: str) -> Any:
    if not number.isdigit() or int(number) >= len(items):
        raise TideError(
            f"{key}: there is a list of {len(items)}, and {number} is no member of it",
            expected=f"a number from 0 to {len(items) - 1}, as in data.0.limit=1000",
            fix="or replace the list: --data SOURCE, or a recipe of your own",
        )
    return items[int(number)]


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Apply `section.key=value` texts; the value is TOML, or a bare word taken as text."""
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key.strip():
            raise TideError(
                f"{text!r} is no setting", expected="section.key=value, such as noise.draws=4"
            )
        try:
            value = tomllib.loads(f"v = {raw}")["v"]
        except tomllib.TOMLDecodeError:
            value = raw
        set_value(values, key.strip(), value)


def to_plain(config: Any) -> Any:
    """A config as JSON-able dicts, for manifests and logs; `type` fields name the variants."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, list | tuple):
        return [to_plain(item) for item in config]
    if isinstance(config, Path):
        return str(config)
    return config
