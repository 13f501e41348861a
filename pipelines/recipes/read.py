"""Recipes: TOML files with a `[cache]` and a `[train]` table; one for each embedded teacher, one for each kind."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from shared.config import CacheConfig, TrainConfig
from shared.errors import TideError
from shared.settings import apply_overrides, build, read_toml
from teacher_cache.teachers.registry import find_teacher

DEFAULT_TEACHER = "tiny-cross"


def packaged_recipe(name: str) -> Path:
    """Path of a recipe that ships with the package."""
    return Path(str(resources.files("pipelines.recipes"))) / f"{name}.toml"


def _recipe_for(teacher: str, teachers_file: Path | None) -> Path:
    """The teacher's own recipe, or the paper's settings for its kind."""
    own = packaged_recipe(teacher)
    if own.exists():
        return own
    return packaged_recipe("shared" if find_teacher(teacher, teachers_file).student_tokens else "cross")


def own_recipe(teacher: str, section: str) -> dict[str, Any]:
    """A table of the recipe that belongs to `teacher`."""
    path = _recipe_for(teacher, None)
    return dict(_section(read_toml(path), section, path))


def _section(values: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    unknown = set(values) - {"cache", "train"}
    if unknown:
        raise TideError(f"{path} has unknown tables: {', '.join(sorted(unknown))}", expected="[cache] and [train]")
    section = values.get(name, {})
    if not isinstance(section, dict):
        raise TideError(f"{name} in {path} is a value", expected=f"a table [{name}]")
    return section


def cache_config(
    teacher: str | None,
    recipe: Path | None,
    overrides: Sequence[str],
    teachers_file: Path | None = None,
    **flags: Any,
) -> CacheConfig:
    """The settings of `tide cache`: recipe, then flags, then `--set` texts."""
    values = _section(read_toml(recipe), "cache", recipe) if recipe else {}
    name = teacher or values.get("teacher", DEFAULT_TEACHER)
    if recipe is None:
        path = _recipe_for(name, teachers_file)
        values = _section(read_toml(path), "cache", path)
    values = {**values, "teacher": name}
    values.setdefault("out", f"caches/{name}")
    values.setdefault("teachers_file", teachers_file)
    values |= {k: v for k, v in flags.items() if v is not None and "." not in k and k != "data"}
    if (source := flags.get("data")) is not None:  # the recipe's other settings stay, unless it has several sources
        before = values.get("data")
        values["data"] = {**(before if isinstance(before, dict) else {}), "source": source}
    apply_overrides(values, overrides)
    return build(CacheConfig, values, "the settings of `tide cache`")


def train_config(
    teacher: str | None,
    recipe: Path | None,
    overrides: Sequence[str],
    teachers_file: Path | None = None,
    **flags: Any,
) -> TrainConfig:
    """The settings of `tide train`. `teacher` chooses the recipe and the default cache and run folders."""
    path = recipe or _recipe_for(teacher or DEFAULT_TEACHER, teachers_file)
    values = dict(_section(read_toml(path), "train", path))
    values.setdefault("cache", f"caches/{teacher or DEFAULT_TEACHER}")
    values.setdefault("out", f"runs/{teacher or DEFAULT_TEACHER}")
    values |= {k: v for k, v in flags.items() if v is not None}
    apply_overrides(values, overrides)
    return build(TrainConfig, values, "the settings of `tide train`")
