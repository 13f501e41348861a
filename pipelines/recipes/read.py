"""Recipes, TOML files with a `[cache]` and a `[train]` table, to settings and back to a command.

There is one for each embedded teacher and one for each kind of teacher. A recipe may name another
with `base` (a packaged one, or a path beside it) and say only what differs.
"""

import itertools
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.settings.build import advice, apply_overrides, build, differences, read_toml, to_plain
from shared.settings.config import CacheConfig, TrainConfig
from shared.system.files import TideError
from teacher_cache.teachers.registry import find_teacher

DEFAULT_TEACHER = "tiny-cross"
_FOLDER = Path(__file__).parent


def packaged_recipe(name: str) -> Path:
    return _FOLDER / f"{name}.toml"


def packaged_recipes() -> list[str]:
    """Names of the recipes for one cache and one run that ship with the package."""
    return sorted(p.stem for p in _FOLDER.glob("*.toml") if "variants" not in read_toml(p))


def find_recipe(name: str, beside: Path = Path()) -> Path:
    """A recipe by its path, from the folder `beside`, or a packaged one by its name."""
    for path in (beside / name, packaged_recipe(name)):
        if path.is_file():
            return path
    names = ", ".join(packaged_recipes())
    raise TideError(f"there is no recipe {name!r}", expected=f"a TOML file, or one of {names}")


def read_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe's tables, those of its `base` below them. TideError where it has others, or where it
    is its own base (`above`: the recipes that lean on this one).
    """
    if path.resolve() in above:
        raise TideError(f"{path} is a base of itself", fix="take one `base` out")
    values = read_toml(path)
    base = values.pop("base", None)
    if unknown := set(values) - {"cache", "train"}:
        what = f"{path} has unknown tables: {', '.join(sorted(unknown))}"
        fix = advice(min(unknown), ["cache", "train", "base"])
        raise TideError(what, expected="[cache] and [train]", fix=fix)
    for name, section in values.items():
        if not isinstance(section, dict):
            raise TideError(f"{name} in {path} is a value", expected=f"a table [{name}]")
    if base is None:
        return values
    below = find_recipe(str(base), path.parent)
    return _over(read_recipe(below, (*above, path.resolve())), values)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables with those of `above` over them; an objective replaces the other whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        tables = isinstance(value, Mapping) and isinstance(old, Mapping)
        merged[key] = _over(old, value) if tables and key != "distillation" else value  # type: ignore[arg-type]
    return merged


def own_recipe(teacher: str, teachers_file: Path | None = None) -> dict[str, Any]:
    """The tables of the teacher's own recipe, or the paper's settings for its kind."""
    path = packaged_recipe(teacher)
    if not path.exists():
        shared = find_teacher(teacher, teachers_file).student_tokens
        path = packaged_recipe("shared" if shared else "cross")
    return read_recipe(path)


def cache_config(
    teacher: str | None,
    recipe: Path | None,
    overrides: Sequence[str],
    teachers_file: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    default: str = DEFAULT_TEACHER,
    **flags: Any,
) -> CacheConfig:
    """The settings of `tide cache`: recipe, then `changes` (nested, as in a recipe), then flags
    (`"noise.draws": 4`; None: not given), then `--set` texts. TideError where there is no such
    setting, or no such teacher.
    """
    tables = read_recipe(recipe) if recipe else {}
    if "train" in tables:  # a misspelt one is better said now
        build(TrainConfig, tables["train"], f"[train] of {recipe}", imports=True)
    values = tables.get("cache", {})
    name = teacher or values.get("teacher", default)
    if recipe is None:
        values = own_recipe(name, teachers_file).get("cache", {})
    if recipe is None and changes and "source" in changes.get("data", ()):
        values = _over(values, {"data": {"limit": None}})  # it was of the recipe's own data
    values = _over({"out": f"caches/{name}", **values, "teacher": name}, changes or {})
    apply_overrides(values, overrides, {"teachers_file": teachers_file, **flags})
    config = build(CacheConfig, values, "`tide cache`")
    find_teacher(config.teacher, config.teachers_file)
    return config


def train_config(
    teacher: str | None,
    recipe: Path | None,
    overrides: Sequence[str],
    teachers_file: Path | None = None,
    changes: Mapping[str, Any] | None = None,
    **flags: Any,
) -> TrainConfig:
    """As `cache_config`, of `tide train`: `teacher` chooses the recipe and the default folders."""
    own = teacher or DEFAULT_TEACHER
    tables = read_recipe(recipe) if recipe else own_recipe(own, teachers_file)
    name = teacher or tables.get("cache", {}).get("teacher", DEFAULT_TEACHER)
    values = {"cache": f"caches/{name}", "out": f"runs/{name}", **tables.get("train", {})}
    values = _over(values, changes or {})
    apply_overrides(values, overrides, flags)
    return build(TrainConfig, values, "`tide train`", imports=True)


def to_toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {to_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # the same for text, numbers and truth values


def train_arguments(values: Mapping[str, Any]) -> list[str]:
    """The arguments of `tide train` for settings: an empty recipe and every setting on its own."""
    arguments = ["--config", str(packaged_recipe("empty"))]
    for key, value in values.items():
        named = key in ("cache", "seed")
        arguments += [f"--{key}", str(value)] if named else ["--set", f"{key}={to_toml(value)}"]
    return arguments


def train_command(settings: Mapping[str, Any]) -> str:
    """The command, as typed in the repository, for the settings that a run has recorded."""

    def changes(values: Mapping[str, Any], defaults: Any) -> dict[str, Any]:
        changed = {}
        for key, value in values.items():
            default = defaults.get(key)
            if value is None or value == default:  # TOML has no word for None
                continue
            changed[key] = value
            if isinstance(value, Mapping):
                same = isinstance(default, Mapping) and default.get("type") == value.get("type")
                changed[key] = changes(value, default if same else {})
        return changed

    values = {"cache": settings["cache"], **changes(settings, to_plain(TrainConfig()))}
    values.pop("out", None)
    command = shlex.join(["tide", "train", *train_arguments(values)])
    return command.replace(str(packaged_recipe("empty")), "pipelines/recipes/empty.toml")


def about(name: str) -> str:
    """The first sentence of a packaged recipe's comment."""
    lines = packaged_recipe(name).read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    text = " ".join(line.removeprefix("# ") for line in comment)
    return re.split(r"[.:;] ", text, maxsplit=1)[0].rstrip(".")


def paper_of(path: Path) -> str:
    """The paper's run that a recipe is to be measured by: by what its objective compares."""
    teacher = read_recipe(path).get("cache", {}).get("teacher")
    if teacher:
        shared = find_teacher(teacher).student_tokens
    else:
        kind = train_config(None, path, []).distillation.needs
        across = "chunks" in cache_config(None, path, []).targets.signals
        shared = path.stem.endswith("shared") or (kind == "topk" and not across)
    return "paper-shared" if shared else "paper-cross"


def describe_recipe(name: str) -> str:
    """The recipe's own text, then each setting of its method that differs from the paper's run."""
    path = find_recipe(name)
    other = packaged_recipe(paper_of(path))
    sides = []
    for side in (other, path):
        cache = replace(cache_config(None, side, []), out=Path(), teacher="")
        train = replace(train_config(None, side, []), out=Path(), cache=Path())
        sides.append({"cache": to_plain(cache), "train": to_plain(train)})
    lines = differences(*sides)
    head = f"No setting differs from {other.stem}."
    if lines:
        head = f"{len(lines)} settings differ, {other.stem} → {path.stem}; docs/method.md says why:"
    return "\n".join([path.read_text(encoding="utf-8"), head, *(f"  {line}" for line in lines)])
