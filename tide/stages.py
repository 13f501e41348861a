"""`prepare`, `cache` and `train`: the commands of the same names, with settings as arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.recipes.read import cache_config, train_config
from shared.settings.config import CacheConfig
from tide.results import Cache, Data, Run

Source = str | dict[str, Any] | Sequence[str | dict[str, Any]]
"""A file, a folder, a glob, hf://OWNER/NAME, stdlib:train; a source with its settings; or several (docs/data.md)."""


def prepare(teacher: str | None = None, data: Source | None = None, **settings: Any) -> Data:
    """Render, tokenise and align the data for a teacher, once. No weight is read, and `cache` finds it again.

    `recipe` and `teachers_file` are paths; all else are settings of `[cache]`. TideError where the data cannot be used.
    """
    from teacher_cache.run.data import open_sides, prepare_data

    config = _cache_config(teacher, data, settings)
    sides = open_sides(config, weights=False)
    found, _ = prepare_data(config, sides)
    return Data(config.prepared_folder, found.examples, found, sides.student)


def cache(teacher: str | None = None, data: Source | None = None, **settings: Any) -> Cache:
    """Stage one: run the teacher once, and write what it knows to Parquet shards in `out` (default: caches/TEACHER).

    Arguments as of `prepare`. What is there already is not computed again. TideError before anything is loaded, where
    that is possible.
    """
    from teacher_cache.run.build import build_cache

    return Cache.open(build_cache(_cache_config(teacher, data, settings)).folder)


def train(cache: Cache | str | Path, **settings: Any) -> Run:
    """Stage two: train a student from a cache into `out` (default: runs/TEACHER).

    `recipe` is a path (default: the one of the cache's teacher); all else are settings of `[train]`. A run that was
    interrupted goes on. TideError where cache, student and settings do not fit.
    """
    from student_train.training.trainer import train_student

    source = cache if isinstance(cache, Cache) else Cache.open(cache)
    recipe, teachers = _paths(settings)
    out = settings.pop("out", None)
    config = train_config(
        source.teacher, recipe, [], teachers, settings, cache=source.folder, out=out
    )
    return Run(config.out, train_student(config))


def _cache_config(
    teacher: str | None, data: Source | None, settings: dict[str, Any]
) -> CacheConfig:
    recipe, teachers = _paths(settings)
    if data is not None and not isinstance(data, str):
        one = isinstance(data, dict)
        settings["data"] = (
            data if one else [{"source": part} if isinstance(part, str) else part for part in data]
        )
        data = None
    return cache_config(teacher, recipe, [], teachers, settings, data=data)


def _paths(settings: dict[str, Any]) -> tuple[Path | None, Path | None]:
    """Recipe and teachers' file, taken out of the settings."""
    recipe, teachers = (settings.pop(name, None) for name in ("recipe", "teachers_file"))
    return None if recipe is None else Path(recipe), None if teachers is None else Path(teachers)
