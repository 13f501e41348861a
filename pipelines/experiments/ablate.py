"""`tide ablate RECIPE`: a grid of students over shared caches, seeds × variants, and one report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from pipelines.evaluation.use_scores import score_all
from pipelines.experiments.grid import LOCK, Job, train_all
from pipelines.recipes.read import own_recipe, train_arguments
from pipelines.reports.paired import paired_table
from pipelines.reports.report import find_runs, write_report
from shared.settings.build import build, read_toml, strict
from shared.settings.config import CacheConfig, TrainConfig
from shared.system.locks import hold
from teacher_cache.run.build import build_cache


@strict
class Variant:
    """A row of the grid: a cache, and what differs from the base settings of training."""

    cache: str
    train: dict[str, Any] = field(default_factory=dict)
    against: str | None = None
    """The variant that it is compared with (default: the undistilled one of its teacher)."""


@strict
class Grid:
    """The recipe of an ablation. `caches` and `train` are parts of `CacheConfig` and `TrainConfig`."""

    caches: dict[str, dict[str, Any]]
    variants: dict[str, Variant]
    seeds: tuple[int, ...] = (0, 1, 2)
    train: dict[str, Any] = field(default_factory=dict)
    use: bool = False
    """Score every student in use, too (`evaluation.use_scores`)."""

    def __post_init__(self) -> None:
        for name, variant in self.variants.items():
            if variant.cache not in self.caches:
                raise ValueError(
                    f"variant {name} names the cache {variant.cache!r}; there are {sorted(self.caches)}"
                )
            if variant.against is not None and variant.against not in self.variants:
                raise ValueError(
                    f"variant {name} is to be compared with {variant.against!r}, which is no variant"
                )


def run_ablation(recipe: Path, out: Path, at_once: int | None = None) -> Path:
    """Build the caches, train every variant at every seed, report. Run again to resume.

    The whole recipe is checked before anything runs. Students start from what the teacher's own recipe names, unless
    the grid says otherwise.
    """
    grid = build(Grid, read_toml(recipe), str(recipe))
    caches = {name: _cache(name, values, out) for name, values in grid.caches.items()}
    starts = {name: _start(config.teacher) for name, config in caches.items()}
    jobs = []
    for seed in grid.seeds:
        for name, variant in grid.variants.items():
            cache = str(caches[variant.cache].out)
            values = {
                **starts[variant.cache],
                **grid.train,
                **variant.train,
                "cache": cache,
                "seed": seed,
            }
            where = f"variant {name} in {recipe}"
            build(TrainConfig, values, where)
            jobs.append(Job(out / f"{name}-seed{seed}", train_arguments(values)))
    with hold(out / LOCK, f"the folder of runs {out}"):
        for config in caches.values():
            build_cache(config)
        train_all(jobs, at_once)
        if grid.use:
            score_all([job.folder for job in jobs], at_once or os.cpu_count() or 1)
    head = f"# {recipe.stem}: {len(grid.variants)} variants, {len(grid.seeds)} seeds\n"
    return write_report(out, head, compared(out, grid))


def _start(teacher: str) -> dict[str, Any]:
    """The student that the teacher's own recipe names, as a part of the settings of training."""
    own = own_recipe(teacher, "train")
    return {"student": own["student"]} if "student" in own else {}


def _cache(name: str, values: Mapping[str, Any], out: Path) -> CacheConfig:
    base = own_recipe(str(values.get("teacher", "tiny-cross")), "cache")
    return build(CacheConfig, {**base, **values, "out": out / "caches" / name}, f"cache {name}")


def compared(out: Path, grid: Grid) -> str:
    """Each variant minus the one that it is compared with: `against`, or the undistilled one of its teacher."""
    plain = {
        grid.caches[v.cache].get("teacher", "tiny-cross"): name
        for name, v in reversed(grid.variants.items())
        if v.train.get("distillation", {}).get("type") == "none"
    }
    pairs = []
    for name, variant in grid.variants.items():
        base = variant.against or plain.get(grid.caches[variant.cache].get("teacher", "tiny-cross"))
        if base not in (None, name):
            pairs.append((str(base), name))
    return f"{paired_table(find_runs(out), pairs)}\n"
