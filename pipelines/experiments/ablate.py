"""`tide ablate RECIPE`: a grid of students over shared caches, seeds × variants, and one report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from pipelines.experiments.grid import Job, train_all
from pipelines.recipes.command_line import train_arguments
from pipelines.recipes.read import own_recipe
from pipelines.reports.report import find_runs, gains_by_seed, write_report
from shared.config import CacheConfig, TrainConfig
from shared.settings import build, read_toml
from shared.variants import strict
from teacher_cache.build import build_cache


@strict
class Variant:
    """A row of the grid: a cache, and what differs from the base settings of training."""

    cache: str
    train: dict[str, Any] = field(default_factory=dict)


@strict
class Grid:
    """The recipe of an ablation. `caches` and `train` are parts of `CacheConfig` and `TrainConfig`."""

    caches: dict[str, dict[str, Any]]
    variants: dict[str, Variant]
    seeds: tuple[int, ...] = (0, 1, 2)
    train: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, variant in self.variants.items():
            if variant.cache not in self.caches:
                raise ValueError(f"variant {name} names the cache {variant.cache!r}; there are {sorted(self.caches)}")


def run_ablation(recipe: Path, out: Path, at_once: int | None = None) -> Path:
    """Build the caches, train every variant at every seed, report. Run again to resume.

    The whole recipe is checked before anything runs.
    """
    grid = build(Grid, read_toml(recipe), str(recipe))
    caches = {name: _cache(name, values, out) for name, values in grid.caches.items()}
    jobs = []
    for seed in grid.seeds:
        for name, variant in grid.variants.items():
            cache = str(caches[variant.cache].out)
            values = {**grid.train, **variant.train, "cache": cache, "seed": seed}
            where = f"variant {name} in {recipe}"
            build(TrainConfig, values, where)
            jobs.append(Job(out / f"{name}-seed{seed}", train_arguments(values)))
    for config in caches.values():
        build_cache(config)
    train_all(jobs, at_once)
    return write_report(out, f"# {recipe.stem}: {len(grid.variants)} variants, {len(grid.seeds)} seeds\n",
                        gains(out, grid))  # fmt: skip


def _cache(name: str, values: Mapping[str, Any], out: Path) -> CacheConfig:
    base = own_recipe(str(values.get("teacher", "tiny-cross")), "cache")
    return build(CacheConfig, {**base, **values, "out": out / "caches" / name}, f"cache {name}")


def gains(out: Path, grid: Grid) -> str:
    """How much lower each variant's held-out NLL is than that of its cache's `undistilled` one, seed by seed."""
    runs = find_runs(out)
    plain = {
        v.cache: name for name, v in grid.variants.items() if v.train.get("distillation", {}).get("type") == "none"
    }
    lines = ["| variant | nats a token below undistilled, mean | by seed |", "|---|---|---|"]
    for name, variant in grid.variants.items():
        teacher = grid.caches[variant.cache].get("teacher")
        base = plain.get(variant.cache) or next(
            (n for c, n in plain.items() if grid.caches[c].get("teacher") == teacher), None
        )
        found = [] if base in (None, name) else gains_by_seed(runs, str(base), name)
        if found:
            lines.append(f"| {name} | {statistics.mean(found):+.3f} | {', '.join(f'{x:+.3f}' for x in found)} |")
    return "\n".join(lines)
