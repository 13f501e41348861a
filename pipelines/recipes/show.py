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


def recipe_path(name: str) -> Path:
    """A packaged recipe by its name, or one of the user's by its path."""
    path = Path(name) if name.endswith(".toml") else packaged_recipe(name)
    if not path.is_file():
        names = ", ".join(packaged_recipes())
        raise TideError(f"there is no recipe {name!r}", expected=f"a TOML file, or one of {names}")
    return path


def about(name: str) -> str:
    """The first sentence of a recipe's comment."""
    lines = recipe_path(name).read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    text = " ".join(line.removeprefix("# ") for line in comment)
    return re.split(r"[.:;] ", text, maxsplit=1)[0].rstrip(".")


def paper_of(path: Path) -> str:
    """The paper's run that a recipe is to be measured by: by what its objective compares."""
    teacher = read_recipe(path).get("cache", {}).get("teacher")
    if teacher:
        shared = find_teacher(teacher).student_tokens
    else:
        kind = train_config(None, path, []).distillation.type
        shared = kind in ("kl", "reverse_kl") or path.stem.endswith("shared")
    return "paper-shared" if shared else "paper-cross"


def describe_recipe(name: str, against: str | None = None) -> str:
    """The recipe's own text, then each setting that differs from `against` (or the paper)."""
    path = recipe_path(name)
    other = recipe_path(against or paper_of(path))
    own, theirs = _settings(path), _settings(other)
    rows = []
    for place in sorted({*own, *theirs}):
        if own.get(place) != theirs.get(place):
            values = [json.dumps(side[place]) if place in side else "–" for side in (theirs, own)]
            rows.append((place, " → ".join(values)))
    text = path.read_text(encoding="utf-8").rstrip() + "\n\n"
    if not rows:
        return f"{text}No setting differs from {other.stem}."
    width = max(len(place) for place, _ in rows)
    lines = [f"  {place:<{width}}  {change}" for place, change in rows]
    return (
        f"{text}{len(rows)} settings differ from {other.stem} ({other.stem} → {path.stem}); "
        "docs/method.md says why:\n" + "\n".join(lines)
    )


def _settings(path: Path) -> dict[str, Any]:
    """Every setting of the method by its dotted name; names and folders are none."""
    flat: dict[str, Any] = {}
    both = {"cache": cache_config(None, path, []), "train": train_config(None, path, [])}
    tables = [(section, to_plain(config)) for section, config in both.items()]
    while tables:
        place, table = tables.pop()
        for key, value in table.items():
            if isinstance(value, dict) and value:
                tables.append((f"{place}.{key}", value))
            elif key not in ("out", "cache", "teacher"):
                flat[f"{place}.{key}"] = value
    return flat
