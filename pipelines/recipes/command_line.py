"""Settings as a command line: what a run was started with, in a form to type again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.settings.build import to_plain
from shared.settings.config import TrainConfig
from shared.system.errors import TideError

_EMPTY = Path(__file__).parent / "empty.toml"


def to_toml(value: Any) -> str:
    """A value as inline TOML."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            escaped = value.replace("\\", "\\\\").replace('"', '\\"')
            return f'"{escaped}"'
        case list() | tuple():
            return "[" + ", ".join(map(to_toml, value)) + "]"
        case dict():
            return (
                "{" + ", ".join(f"{key} = {to_toml(inner)}" for key, inner in value.items()) + "}"
            )
    raise TideError(
        f"{value!r} has no form in TOML", expected="text, numbers, truth values, lists and tables"
    )


def train_arguments(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The arguments of `tide train` for settings in the form of TOML: an empty recipe and every setting on its own."""
    flags = [part for key in ("cache", "seed") for part in (f"--{key}", str(values[key]))]
    rest = {key: value for key, value in values.items() if key not in ("cache", "seed")}
    sets = [part for key, value in rest.items() for part in ("--set", f"{key}={to_toml(value)}")]
    return ("--config", str(_EMPTY), *flags, *sets)


def train_command(settings: Mapping[str, Any]) -> str:
    """The command, as typed in the repository, for the settings that a run has recorded."""
    changed = _changes(settings, to_plain(TrainConfig()))
    arguments = train_arguments({"cache": settings["cache"], "seed": settings["seed"], **changed})
    return "tide train " + shlex.join(
        "pipelines/recipes/empty.toml" if a == str(_EMPTY) else a for a in arguments
    )


def _changes(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What differs from the defaults. What is None is left out, as TOML has no word for it."""
    changed = {}
    for key, value in values.items():
        if key in ("cache", "seed", "out") or value is None or value == defaults.get(key):
            continue
        inner = defaults.get(key)
        if isinstance(value, Mapping):
            same_kind = isinstance(inner, Mapping) and inner.get("type") == value.get("type")
            changed[key] = _changes(
                value, inner if same_kind and isinstance(inner, Mapping) else {}
            )
        else:
            changed[key] = value
    return changed
