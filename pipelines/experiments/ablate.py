"""Many students over shared caches, variants × seeds, and one report: `tide ablate RECIPE`.

Each training is a `tide train` of its own, a few run at a time, and finished ones are not repeated.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from pipelines.evaluation.use_scores import score_all
from pipelines.experiments import report
from pipelines.recipes import read as recipes
from shared.settings.build import apply_overrides, build, read_toml, require, strict
from shared.settings.config import CacheConfig, TrainConfig
from shared.system.files import TideError
from shared.system.processes import end_children, hold, start_child
from teacher_cache.run.build import build_cache


@strict
class Variant:
    """A row of the grid: a cache, and what differs from the base settings of training."""

    cache: str
    train: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Settings of training (or `cache`) and their values: a variant for each of their product."""
    seeds: tuple[int, ...] | None = None
    """Default: the grid's."""
    against: str | None = None
    """The variant that it is compared with (default: the undistilled one of its teacher)."""


@strict
class Grid:
    """The recipe of an ablation. `cache` and `train` are the settings that all share, of `[cache]`
    and `[train]`. In a cache's texts {seed} is the seed of the students, for whom there is one each
    then; a cache with an `out` of its own may be one that other grids use too.
    """

    caches: dict[str, dict[str, Any]]
    variants: dict[str, Variant]
    seeds: tuple[int, ...] = (0, 1, 2)
    cache: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    use: bool = False
    """Score every student in use, too (`evaluation.use_scores`)."""

    def __post_init__(self) -> None:
        for name, variant in self.variants.items():
            cache, against = variant.cache, variant.against
            caches = f"expected one of {[*self.caches]}"
            require(cache in self.caches, f"variant {name} has the cache {cache!r}, {caches}")
            known = against in (None, *self.variants)
            require(known, f"variant {name} is against {against!r}, expected another variant")

    def teacher(self, cache: str) -> str:
        return {"teacher": recipes.DEFAULT_TEACHER, **self.cache, **self.caches[cache]}["teacher"]

    def cache_config(self, name: str, seed: int, out: Path) -> CacheConfig:
        """The settings of a cache for the students of a seed; it lies below `out`."""
        base = recipes.own_recipe(self.teacher(name)).get("cache", {})
        text = json.dumps({**base, **self.cache, **self.caches[name]})
        own = name if "{seed}" not in text else f"{name}-{seed}"
        settings = json.loads(text.replace("{seed}", str(seed)))
        settings.setdefault("out", out / "caches" / own)
        return build(CacheConfig, settings, f"cache {own}")

    def expanded(self) -> "Grid":
        """The same grid with every variant's axes written out, as `KL-0.001-192`."""
        variants = {}
        for name, variant in self.variants.items():
            for values in itertools.product(*variant.axes.values()):
                one = {**asdict(variant), "axes": {}}
                for key, value in zip(variant.axes, values, strict=True):
                    apply_overrides(one, (), {key if key == "cache" else f"train.{key}": value})
                title = "-".join([name, *map(str, values)])
                variants[title] = build(Variant, one, f"variant {title}")
        return replace(self, variants=variants)

    def pairs(self) -> list[tuple[str, str]]:
        """(base, other): each variant behind the one that it is compared with."""
        undistilled: dict[str, str] = {}  # by teacher: the first of its variants
        for name, variant in self.variants.items():
            if variant.train.get("distillation", {}).get("type") == "none":
                undistilled.setdefault(self.teacher(variant.cache), name)
        pairs = []
        for name, variant in self.variants.items():
            base = variant.against or undistilled.get(self.teacher(variant.cache))
            if base is not None and base != name:
                pairs.append((base, name))
        return pairs


def read_grid(recipe: Path) -> Grid:
    return build(Grid, read_toml(recipe), str(recipe)).expanded()


def run_ablation(recipe: Path, out: Path, at_once: int | None = None) -> Path:
    """Build the caches, train every variant at every seed, report. Run again to resume."""
    grid = read_grid(recipe)
    train_grid(grid, out, at_once)
    head = f"# {recipe.stem}: {len(grid.variants)} variants, {len(grid.seeds)} seeds\n"
    table = report.paired_table(report.find_runs(out), grid.pairs())
    return report.write_report(out, head, f"{table}\n")


def train_grid(grid: Grid, out: Path, at_once: int | None = None) -> None:
    """Caches and students below `out`. Students start from what the teacher's own recipe names,
    unless the grid says otherwise. The whole grid is checked before anything runs.
    """
    # 1. check all settings
    caches, jobs = {}, {}
    variants = grid.variants.items()
    seeds = sorted({seed for _, variant in variants for seed in variant.seeds or grid.seeds})
    for seed, (name, variant) in itertools.product(seeds, variants):
        if seed in (variant.seeds or grid.seeds):
            cache = grid.cache_config(variant.cache, seed, out)
            caches[cache.out] = cache
            own = recipes.own_recipe(cache.teacher).get("train", {})
            start = {key: own[key] for key in own.keys() & {"student"}}
            values = {**start, **grid.train, **variant.train, "cache": str(cache.out), "seed": seed}
            build(TrainConfig, values, f"variant {name}", imports=True)
            jobs[out / f"{name}-seed{seed}"] = recipes.train_arguments(values)
    # 2. caches, then students, then their scores in use
    at_once = at_once or os.cpu_count() or 1
    with hold(out / ".lock", f"the folder of runs {out}"):
        for config in caches.values():
            build_cache(config)
        train_all(jobs, at_once)
        if grid.use:
            score_all([*jobs], at_once)


def train_all(jobs: Mapping[Path, Sequence[str]], at_once: int) -> None:
    """Train into folders by arguments of `tide train`, `at_once` at a time, one thread each; go on
    where it stopped. TideError with the end of its log where one fails.
    """
    waiting = [folder for folder in jobs if not (folder / "history.json").exists()]
    running: dict[subprocess.Popen[bytes], Path] = {}
    done = len(jobs) - len(waiting)
    with tqdm(total=len(jobs), initial=done, unit="student", desc="train") as bar:
        try:
            while waiting or running:
                # 1. begin
                while waiting and len(running) < at_once:
                    folder = waiting.pop(0)
                    folder.mkdir(parents=True, exist_ok=True)
                    words = ["train", *jobs[folder], "--out", str(folder)]
                    command = [sys.executable, "-m", "pipelines.cli", *words]
                    with (folder / "log.txt").open("wb") as log:
                        running[start_child(command, {"OMP_NUM_THREADS": "1"}, log)] = folder
                time.sleep(0.5)
                # 2. look who has ended
                for process in [p for p in running if p.poll() is not None]:
                    folder = running.pop(process)
                    if process.returncode != 0:
                        end = (folder / "log.txt").read_text(errors="replace")[-2000:]
                        failed = f"training {folder.name} failed (exit {process.returncode})"
                        raise TideError(f"{failed}:\n{end}")
                    bar.update()
        finally:
            end_children([*running])
