"""`tide ablate RECIPE`: a grid of students over shared caches, seeds × variants, and one report.

Each training is a `tide train` of its own, a few run at a time, and finished ones are not repeated.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipelines.evaluation.use_scores import score_all
from pipelines.recipes.read import DEFAULT_TEACHER, own_recipe, train_arguments
from pipelines.reports.paired import paired_table
from pipelines.reports.report import find_runs, write_report
from shared.settings.build import build, read_toml, require, strict
from shared.settings.config import CacheConfig, TrainConfig
from shared.system.errors import TideError
from shared.system.files import read_json
from shared.system.processes import end_children, hold, start_child
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
    """The recipe of an ablation. `caches` and `train` are parts of `[cache]` and `[train]`."""

    caches: dict[str, dict[str, Any]]
    variants: dict[str, Variant]
    seeds: tuple[int, ...] = (0, 1, 2)
    train: dict[str, Any] = field(default_factory=dict)
    use: bool = False
    """Score every student in use, too (`evaluation.use_scores`)."""

    def __post_init__(self) -> None:
        for name, variant in self.variants.items():
            one_of = f"expected one of {[*self.caches]}"
            message = f"variant {name} has the cache {variant.cache!r}, {one_of}"
            require(variant.cache in self.caches, message)
            message = f"variant {name} is against {variant.against!r}, expected another variant"
            require(variant.against in (None, *self.variants), message)

    def pairs(self) -> list[tuple[str, str]]:
        """(base, other): each variant behind the one that it is compared with."""

        def teacher(variant: Variant) -> str:
            return self.caches[variant.cache].get("teacher", DEFAULT_TEACHER)

        undistilled = {
            teacher(variant): name
            for name, variant in reversed(self.variants.items())
            if variant.train.get("distillation", {}).get("type") == "none"
        }
        pairs = []
        for name, variant in self.variants.items():
            base = variant.against or undistilled.get(teacher(variant))
            if base is not None and base != name:
                pairs.append((base, name))
        return pairs


def run_ablation(recipe: Path, out: Path, at_once: int | None = None) -> Path:
    """Build the caches, train every variant at every seed, report. Run again to resume."""
    grid = build(Grid, read_toml(recipe), str(recipe))
    train_grid(grid, out, at_once)
    head = f"# {recipe.stem}: {len(grid.variants)} variants, {len(grid.seeds)} seeds\n"
    return write_report(out, head, paired_table(find_runs(out), grid.pairs()) + "\n")


def train_grid(grid: Grid, out: Path, at_once: int | None = None) -> None:
    """Caches and students below `out`. Students start from what the teacher's own recipe names,
    unless the grid says otherwise. The whole grid is checked before anything runs.
    """
    # 1. check all settings
    caches = {}
    for name, values in grid.caches.items():
        base = own_recipe(values.get("teacher", DEFAULT_TEACHER)).get("cache", {})
        settings = {**base, **values, "out": out / "caches" / name}
        caches[name] = build(CacheConfig, settings, f"cache {name}")
    jobs = {}
    for seed in grid.seeds:
        for name, variant in grid.variants.items():
            cache = caches[variant.cache]
            own = own_recipe(cache.teacher).get("train", {})
            start = {key: own[key] for key in own.keys() & {"student"}}
            values = {**start, **grid.train, **variant.train, "cache": str(cache.out), "seed": seed}
            build(TrainConfig, values, f"variant {name}")
            jobs[out / f"{name}-seed{seed}"] = train_arguments(values)
    # 2. caches, then students, then their scores in use
    at_once = at_once or os.cpu_count() or 1
    with hold(out / ".lock", f"the folder of runs {out}"):
        for config in caches.values():
            build_cache(config)
        train_all(jobs, at_once)
        if grid.use:
            score_all([*jobs], at_once)


def train_all(jobs: Mapping[Path, Sequence[str]], at_once: int) -> None:
    """Train into folders by arguments of `tide train`, `at_once` at a time, one thread each.

    TideError with the end of its log where one fails. Called again, it goes on where it stopped.
    """
    waiting = [folder for folder in jobs if not (folder / "history.json").exists()]
    running: dict[subprocess.Popen[bytes], Path] = {}
    # smoothing=0: the mean rate since the start, starting times and other load included
    bar = tqdm(unit="step", desc=f"train {len(jobs)} students", smoothing=0)
    with bar:
        try:
            while waiting or running:
                # 1. begin
                while waiting and len(running) < at_once:
                    folder = waiting.pop(0)
                    folder.mkdir(parents=True, exist_ok=True)
                    command = [sys.executable, "-m", "pipelines.cli", "train", *jobs[folder]]
                    command += ["--out", str(folder)]
                    with (folder / "log.txt").open("wb") as log:
                        running[start_child(command, {"OMP_NUM_THREADS": "1"}, log)] = folder
                time.sleep(0.5)
                # 2. show the steps; students that have not begun are taken to be as long as others
                steps, totals = 0, []
                for folder in jobs:
                    with suppress(OSError, ValueError, KeyError):
                        state = read_json(folder / "progress.json")
                        steps += int(state["step"])
                        totals.append(int(state["max_steps"]))
                if totals:
                    bar.total = sum(totals) + max(totals) * (len(jobs) - len(totals))
                    bar.update(steps - bar.n)
                # 3. look who has ended
                for process in [p for p in running if p.poll() is not None]:
                    folder = running.pop(process)
                    if process.returncode != 0:
                        end = (folder / "log.txt").read_text(errors="replace")[-2000:]
                        what = f"training {folder.name} failed (exit {process.returncode}):\n{end}"
                        raise TideError(what)
        finally:
            end_children([*running])
