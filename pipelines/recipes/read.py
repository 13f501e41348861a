"""Recipes: TOML files with a `[cache]` and a `[train]` table; one for each embedded teacher, one for each kind.

A recipe may name another with `base` (a packaged one, or a path beside it) and say only what differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from shared.settings.build import apply_overrides, build, read_toml
from shared.settings.config import CacheConfig, TrainConfig
from shared.settings.nearest import advice
from shared.system.errors import TideError
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
    return packaged_recipe(
        "shared" if find_teacher(teacher, teachers_file).student_tokens else "cross"
    )


def packaged_recipes() -> list[str]:
    """Names of the recipes for one cache and one run that ship with the package."""
    return sorted(
        p.stem for p in packaged_recipe("x").parent.glob("*.toml") if "variants" not in read_toml(p)
    )


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe's tables, those of its `base` below them. TideError where it has others, or its bases go in a circle."""
    return _read_recipe(path, ())


def _read_recipe(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        raise TideError(f"{path} is a base of itself", fix="take one `base` out")
    values = read_toml(path)
    base = values.pop("base", None)
    unknown = set(values) - {"cache", "train"}
    if unknown:
        near = advice(min(unknown), ["cache", "train", "base"])
        raise TideError(
            f"{path} has unknown tables: {', '.join(sorted(unknown))}",
            expected="[cache] and [train]",
            fix=near,
        )
    for name, section in values.items():
        if not isinstance(section, dict):
            raise TideError(f"{name} in {path} is a value", expected=f"a table [{name}]")
    if base is None:
        return values
    if not isinstance(base, str):
        raise TideError(
            f"base in {path} is {base!r}", expected="the name of a packaged recipe, or a path"
        )
    own = path.parent / base
    below = own if own.is_file() else packaged_recipe(base)
    if not below.is_file():
        raise TideError(
            f"{path} has the base {base!r}",
            expected=f"a path, or one of {', '.join(packaged_recipes())}",
        )
    return _over(_read_recipe(below, (*above, path.resolve())), values)


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested tables with those of `above` over them; a variant (a table with a `type`) replaces the other whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        inner = isinstance(value, dict) and isinstance(old, dict) and "type" not in value
        merged[key] = _over(old, value) if inner else value  # type: ignore[arg-type]
    return merged


def own_recipe(teacher: str, section: str) -> dict[str, Any]:
    """A table of the recipe that belongs to `teacher`."""
    return dict(_section(_recipe_for(teacher, None), section))


def _section(path: Path, name: str) -> dict[str, Any]:
    return read_recipe(path).get(name, {})


def cache_config(
    teacher: str | None,
    recipe: Path | None,
    overrides: Sequence[str],
    teachers_file: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    **flags: Any,
) -> CacheConfig:
    """The settings of `tide cache`: recipe, then `changes` (nested, as in a recipe), then flags, then `--set` texts."""
    tables = read_recipe(recipe) if recipe else {}
    values = tables.get("cache", {})
    if "train" in tables:  # a misspelt one is better said now
        build(TrainConfig, tables["train"], f"[train] of {recipe}")
    name = teacher or values.get("teacher", DEFAULT_TEACHER)
    if recipe is None:
        values = _section(_recipe_for(name, teachers_file), "cache")
    values = _over({**values, "teacher": name}, dict(changes or {}))
    values.setdefault("out", f"caches/{name}")
    values.setdefault("teachers_file", teachers_file)
    values |= {k: v for k, v in flags.items() if v is not None and "." not in k and k != "data"}
    if (
        source := flags.get("data")
    ) is not None:  # the recipe's other settings stay, unless it has several sources
        before = values.get("data")
        values["data"] = {**(before if isinstance(before, dict) else {}), "source": source}
    apply_overrides(values, overrides)
    return build(CacheConfig, values, "the settings of `tide cache`")


def train_config(
    teacher: str | None,
    recipe: Path | None,
    overrides: Sequence[str],
    teachers_file: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    **flags: Any,
) -> TrainConfig:
    """The settings of `tide train`, in the order of `cache_config`. `teacher` chooses the recipe and the default cache
    and run folders.
    """
    path = recipe or _recipe_for(teacher or DEFAULT_TEACHER, teachers_file)
    tables = read_recipe(path)
    values = _over(tables.get("train", {}), dict(changes or {}))
    name = teacher or tables.get("cache", {}).get("teacher", DEFAULT_TEACHER)
    values.setdefault("cache", f"caches/{name}")
    values.setdefault("out", f"runs/{name}")
    values |= {k: v for k, v in flags.items() if v is not None}
    apply_overrides(values, overrides)
    return build(TrainConfig, values, "the settings of `tide train`")
