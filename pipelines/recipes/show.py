"""`tide recipes show NAME`: a recipe's settings, and how far they are from the paper's run."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

from pipelines.recipes.read import (
    cache_config,
    packaged_recipe,
    packaged_recipes,
    read_recipe,
    train_config,
)
from shared.settings.build import to_plain
from shared.system.errors import TideError
from teacher_cache.teachers.registry import find_teacher

_PLACES = ("out", "cache", "teacher")
"""Names and folders: no setting of the method."""


def recipe_path(name: str) -> Path:
    """A packaged recipe by its name, or one of the user's by its path."""
    path = Path(name) if name.endswith(".toml") else packaged_recipe(name)
    if not path.is_file():
        raise TideError(
            f"there is no recipe {name!r}",
            expected=f"a TOML file, or one of {', '.join(packaged_recipes())}",
        )
    return path


def about(name: str) -> str:
    """The first sentence of a recipe's comment."""
    lines = recipe_path(name).read_text(encoding="utf-8").splitlines()
    comment = " ".join(
        line.removeprefix("# ") for line in itertools.takewhile(lambda x: x.startswith("#"), lines)
    )
    return re.split(r"[.:;] ", comment, maxsplit=1)[0].rstrip(".")


def paper_of(path: Path) -> str:
    """The paper's run that a recipe is to be measured by: by what its objective compares."""
    kind = train_config(None, path, []).distillation.type
    teacher = read_recipe(path).get("cache", {}).get("teacher")
    own = find_teacher(teacher).student_tokens if teacher else None
    shared = (
        own if own is not None else kind in ("kl", "reverse_kl") or path.stem.endswith("shared")
    )
    return "paper-shared" if shared else "paper-cross"


def describe_recipe(name: str, against: str | None = None) -> str:
    """The recipe's own text, then every setting in which it differs from `against` (default: the paper's run)."""
    path = recipe_path(name)
    other = recipe_path(against or paper_of(path))
    lines = [path.read_text(encoding="utf-8").rstrip(), ""]
    rows = _distance(path, other)
    if not rows:
        return "\n".join([*lines, f"No setting differs from {other.stem}."])
    width = max(len(place) for place, _, _ in rows)
    lines.append(
        f"{len(rows)} settings differ from {other.stem} ({other.stem} → {path.stem}); docs/method.md says why:"
    )
    return "\n".join(
        [*lines, *(f"  {place:<{width}}  {theirs} → {own}" for place, own, theirs in rows)]
    )


def _distance(path: Path, other: Path) -> list[tuple[str, str, str]]:
    rows = []
    own, theirs = _leaves(_settings(path)), _leaves(_settings(other))
    for place in sorted({*own, *theirs}):
        if own.get(place) != theirs.get(place):
            values = [json.dumps(side[place]) if place in side else "–" for side in (own, theirs)]
            rows.append((place, values[0], values[1]))
    return rows


def _settings(path: Path) -> dict[str, Any]:
    both = {
        "cache": to_plain(cache_config(None, path, [])),
        "train": to_plain(train_config(None, path, [])),
    }
    for section in both.values():
        for name in _PLACES:
            section.pop(name, None)
    return both


def _leaves(values: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(values, dict) or not values:
        return {place: values}
    return {
        k: v
        for key, value in values.items()
        for k, v in _leaves(value, f"{place}.{key}".strip(".")).items()
    }
