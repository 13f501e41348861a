"""Many students over shared caches, variants × seeds, and one report: `tide ablate RECIPE`, and the
demo, whose grid is the main job at the size of a laptop.

Each training is a `tide train` of its own, a few run at a time, and finished ones are not repeated.
"""

import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import field
from pathlib import Path
from typing import Any

import polars as pl
import torch
from tqdm import tqdm

from pipelines.evaluation.use_scores import score_all
from pipelines.experiments import report
from pipelines.recipes import read as recipes
from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import load_model
from shared.settings.build import build, read_toml, require, strict
from shared.settings.config import CacheConfig, TrainConfig
from shared.system.files import TideError, read_json
from shared.system.hardware import describe_hardware
from shared.system.processes import end_children, hold, start_child
from student_train.training import heldout as held
from student_train.using.student import load_for_use
from teacher_cache.run.build import build_cache
from teacher_cache.teachers.registry import find_teacher

logger = logging.getLogger(__name__)


@strict
class Variant:
    """A row of the grid: a cache, and what differs from the base settings of training."""

    cache: str
    train: dict[str, Any] = field(default_factory=dict)
    against: str | None = None
    """The variant that it is compared with (default: the undistilled one of its teacher)."""


@strict
class Grid:
    """The recipe of an ablation. `caches` and `train` are parts of `[cache]` and `[train]`; in a
    cache's texts {seed} is the seed of the students, for whom there is one each then.
    """

    caches: dict[str, dict[str, Any]]
    variants: dict[str, Variant]
    seeds: tuple[int, ...] = (0, 1, 2)
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

    def pairs(self) -> list[tuple[str, str]]:
        """(base, other): each variant behind the one that it is compared with."""
        undistilled: dict[str, str] = {}  # by teacher: the first of its variants
        teachers = {}
        for name, variant in self.variants.items():
            teacher = self.caches[variant.cache].get("teacher", recipes.DEFAULT_TEACHER)
            teachers[name] = teacher
            if variant.train.get("distillation", {}).get("type") == "none":
                undistilled.setdefault(teacher, name)
        pairs = []
        for name, variant in self.variants.items():
            base = variant.against or undistilled.get(teachers[name])
            if base is not None and base != name:
                pairs.append((base, name))
        return pairs


def run_ablation(recipe: Path, out: Path, at_once: int | None = None) -> Path:
    """Build the caches, train every variant at every seed, report. Run again to resume."""
    grid = build(Grid, read_toml(recipe), str(recipe))
    train_grid(grid, out, at_once)
    head = f"# {recipe.stem}: {len(grid.variants)} variants, {len(grid.seeds)} seeds\n"
    table = report.paired_table(report.find_runs(out), grid.pairs())
    return report.write_report(out, head, f"{table}\n")


def train_grid(grid: Grid, out: Path, at_once: int | None = None) -> None:
    """Caches and students below `out`. Students start from what the teacher's own recipe names,
    unless the grid says otherwise. The whole grid is checked before anything runs.
    """
    # 1. check all settings
    caches = {}
    for name, values in grid.caches.items():
        base = recipes.own_recipe(values.get("teacher", recipes.DEFAULT_TEACHER)).get("cache", {})
        text = json.dumps({**base, **values})
        for seed in grid.seeds:
            own = name if "{seed}" not in text else f"{name}-{seed}"
            settings = json.loads(text.replace("{seed}", str(seed)))
            settings["out"] = out / "caches" / own
            caches[name, seed] = build(CacheConfig, settings, f"cache {own}")
    jobs = {}
    for seed in grid.seeds:
        for name, variant in grid.variants.items():
            cache = caches[variant.cache, seed]
            own = recipes.own_recipe(cache.teacher).get("train", {})
            start = {key: own[key] for key in own.keys() & {"student"}}
            values = {**start, **grid.train, **variant.train, "cache": str(cache.out), "seed": seed}
            build(TrainConfig, values, f"variant {name}", imports=True)
            jobs[out / f"{name}-seed{seed}"] = recipes.train_arguments(values)
    # 2. caches, then students, then their scores in use
    at_once = at_once or os.cpu_count() or 1
    with hold(out / ".lock", f"the folder of runs {out}"):
        for config in {config.out: config for config in caches.values()}.values():
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
    with tqdm(unit="step", desc=f"train {len(jobs)} students", smoothing=0) as bar:
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
                        failed = f"training {folder.name} failed (exit {process.returncode})"
                        raise TideError(f"{failed}:\n{end}")
        finally:
            end_children([*running])


def demo_grid(seeds: int) -> Grid:
    """The paper's objective for both kinds of teacher, and the best that the ablations found
    (docs/ablations.md), each against the undistilled student of its tokenizer, at the best rate of
    those tried for cross-entropy alone.

    All start from the embedded, pre-trained student of their tokenizer and take the same steps over
    the same functions.
    """
    caches, variants = {}, {}
    for kind in ("cross", "shared"):
        for title, name in ((f"TIDE-{kind.title()}", kind), (f"best-{kind}", f"{kind}-best")):
            recipe = recipes.read_recipe(recipes.packaged_recipe(f"half-{name}"))
            train, cache = recipe["train"], f"tiny-{name}"
            if recipe["cache"] == caches.get(f"tiny-{kind}"):  # one serves both
                cache = f"tiny-{kind}"
            caches[cache] = recipe["cache"]
            variants[title] = Variant(cache, train, against=f"undistilled-{kind}")
        alone = {"distillation": {"type": "none"}, "weight": 1.0, "learning_rate": 5e-4}
        variants[f"undistilled-{kind}"] = Variant(cache, {**train, **alone})
    return Grid(caches, variants, tuple(range(seeds)))


def run_demo(out: Path, seeds: int) -> Path:
    """Caches, students, report. Interrupted and run again, it goes on where it stopped."""
    for name, value in describe_hardware():
        logger.info("%-16s%s", name, value)
    started = time.monotonic()
    grid = demo_grid(seeds)
    train_grid(grid, out)
    minutes = (time.monotonic() - started) / 60
    runs = report.find_runs(out)
    paired = report.paired_table(runs, grid.pairs())
    head = (
        "# Demo: students of the embedded teacher\n\nThey know half of the library's modules, the "
        "teacher all; trained on functions of some of the others, scored on functions of yet other "
        "modules that the teacher has not seen either. Fixed masks, mean ± spread over seeds.\n"
    )
    tail = (
        "What they started from, and the teacher, on the same held-out functions and masks:\n\n"
        f"{start_and_teacher()}\n\n{verdicts(runs, grid)}\n\n{paired}"
        f"\n\nThis `make demo` took {minutes:.1f} minutes; finished work is not redone. Nats a "
        "token compare students of one cache; bits per byte also compare tokenizers.\n"
    )
    return report.write_report(out, head, tail)


def verdicts(runs: list[report.Run], grid: Grid) -> str:
    """One sentence a distilled student: did distillation help, by how much, in every seed?"""
    lines = []
    for base, name in grid.pairs():
        gains = [-x for x in report.paired_differences(runs, base, name, "nll")]
        if not gains:
            continue
        word = "helped" if min(gains) > 0 else "helped for some seeds only"
        word = word if max(gains) > 0 else "did not help"
        lines.append(
            f"* **{name}** {word}: held-out NLL {statistics.mean(gains):+.3f} nats a token lower "
            f"than undistilled on average ({', '.join(f'{g:+.3f}' for g in gains)} by seed)."
        )
    return "\n".join(lines)


def start_and_teacher() -> str:
    """A table of the pre-trained students and the teacher."""
    rows = []
    for kind in ("cross", "shared"):
        recipe = recipes.packaged_recipe(f"half-{kind}")
        training = recipes.train_config(None, recipe, [])
        lengths = recipes.cache_config(None, recipe, []).lengths
        assert training.student.checkpoint is not None and training.heldout is not None
        folder = resolve(training.student.checkpoint)
        student = load_for_use(folder, "cpu")
        heldout = held.prepare_heldout(training.heldout, lengths, student.tokenizer,
                                       student.special.mask, training.heldout_draws)  # fmt: skip
        predict = held.student_predictor(student.model, lengths.block)
        scores = held.masked_nll(student.model, heldout, predict)
        rows.append({"model": f"student {kind}, pre-trained", **report.score_cells([scores])})
    # the teacher reads the very ids and masks of the last, which shares its tokenizer
    entry = find_teacher("tiny-shared")
    model = load_model(open_checkpoint(resolve(entry.model)), entry.architecture, torch.float32)
    scores = held.masked_nll(model, heldout, held.teacher_predictor(model))
    rows.append({"model": "teacher", **report.score_cells([scores])})
    return report.to_markdown(pl.DataFrame(rows))
