"""The main job at the size of a laptop: `tide demo`, and how much data a teacher is worth.

The teacher knows all of the library, its students half; they are trained on functions of the other
half and scored on functions of yet other modules, which the teacher has not seen either.
"""

import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import torch
from matplotlib import pyplot as plt

from pipelines.experiments import report
from pipelines.experiments.ablate import Grid, Variant, read_grid, train_grid
from pipelines.recipes import read as recipes
from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import load_model
from shared.settings.config import DataConfig
from student_train.training import heldout as held
from student_train.using.student import load_for_use
from teacher_cache.teachers.registry import find_teacher

KINDS = ("cross", "shared")
ALONE = {"cross": 5e-4, "shared": 2e-4}  # the best rates of cross-entropy alone, by tune.toml


def demo_grid(seeds: int) -> Grid:
    """The paper's objective for both kinds of teacher, and the best that the ablations found
    (docs/ablations.md), each against the undistilled student of its tokenizer: all at their best
    rates, from the same pre-trained student, in the same steps over the same functions.
    """
    caches, variants = {}, {}
    for kind in KINDS:
        for title, name in ((f"TIDE-{kind.title()}", kind), (f"best-{kind}", f"{kind}-best")):
            recipe = recipes.read_recipe(recipes.packaged_recipe(f"half-{name}"))
            train, cache = recipe["train"], f"tiny-{name}"
            if recipe["cache"] == caches.get(f"tiny-{kind}"):  # one serves both
                cache = f"tiny-{kind}"
            caches[cache] = recipe["cache"]
            variants[title] = Variant(cache, train, against=f"undistilled-{kind}")
        alone = {"distillation": {"type": "none"}, "weight": 1.0, "learning_rate": ALONE[kind]}
        variants[f"undistilled-{kind}"] = Variant(cache, {**train, **alone})
    return Grid(caches, variants, tuple(range(seeds)))


def run_demo(out: Path, seeds: int | None, full: bool = False) -> Path:
    """Caches, students, report (`full`: over numbers of functions). Again, it goes on."""
    started = time.monotonic()
    grid = read_grid(recipes.packaged_recipe("curve")) if full else demo_grid(3)
    if seeds is not None:
        grid = replace(grid, seeds=tuple(range(seeds)))
    train_grid(grid, out)
    minutes = (time.monotonic() - started) / 60
    runs = report.find_runs(out)
    # The pre-trained students and the teacher on the held-out functions, and on those of other
    # packages, of which none of them has seen anything.
    entry, found = find_teacher("tiny-shared"), {}
    teacher = load_model(open_checkpoint(resolve(entry.model)), entry.architecture, torch.float32)
    packages = DataConfig("stdlib:packages", limit=128)
    places = (("", None), (", other packages", packages))
    for (words, other), kind in itertools.product(places, KINDS):
        recipe = recipes.packaged_recipe(f"half-{kind}")
        train = recipes.train_config(None, recipe, [])
        lengths = recipes.cache_config(None, recipe, []).lengths
        student = load_for_use(resolve(str(train.student.checkpoint)), "cpu")
        data: Any = other or train.heldout
        mask, draws = student.special.mask, train.heldout_draws
        heldout = held.prepare_heldout(data, lengths, student.tokenizer, mask, draws)
        predict = held.student_predictor(student.model, lengths.block)
        scores = held.masked_nll(student.model, heldout, predict)
        found[f"student {kind}, pre-trained{words}"] = scores
        if kind == "shared":  # the teacher's tokenizer: it reads the very ids and masks
            predict = held.teacher_predictor(teacher)
            found[f"teacher{words}"] = held.masked_nll(teacher, heldout, predict)
    rows = [{"model": name, **report.score_cells([scores])} for name, scores in found.items()]
    rows = [{title: cell for title, cell in row.items() if cell != "–"} for row in rows]
    head = (
        "# Demo: students of the embedded teacher\n\nThey know half of the library's modules, the "
        "teacher all; trained on functions of some of the others, scored on functions of yet other "
        "modules that the teacher has not seen either. Fixed masks, mean ± spread over seeds.\n"
    )
    parts = [
        "What they started from, and the teacher, on the same held-out functions and masks:",
        report.to_markdown(pl.DataFrame(rows)),
        data_curve(runs, found["teacher"]["bits_per_byte"], out) if full else "",
        report.paired_table(runs, grid.pairs()),
        f"This took {minutes:.1f} minutes; finished work is not redone. Nats a token compare "
        "students of one cache; bits per byte also compare tokenizers.\n",
    ]
    return report.write_report(out, head, "\n\n".join(filter(None, parts)))


def data_curve(runs: list[report.Run], teacher: float, folder: Path) -> str:
    """Draw bits per byte against the number of functions, and say how many functions without a
    teacher one is worth. Variants are named `distilled-N` and `undistilled-N`.
    """
    # 1. with or without the teacher, by number of functions: a score a seed
    scores: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        name, _, functions = run.variant.rpartition("-")
        scores[name][int(functions)].append(run.scores["bits_per_byte"])
    # 2. a line each, and a band from the least to the most over seeds
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    lines = {}
    for name, label in (("undistilled", "without a teacher"), ("distilled", "with the teacher")):
        points = sorted(scores[name].items())
        lines[name] = {n: statistics.mean(values) for n, values in points}
        (line,) = axis.plot(*zip(*lines[name].items(), strict=True), marker="o", label=label)
        low, high = ([limit(values) for _, values in points] for limit in (min, max))
        axis.fill_between([n for n, _ in points], low, high, alpha=0.2, color=line.get_color())
    axis.axhline(teacher, linestyle="--", color="grey", label="the teacher itself")
    # 3. where the line without a teacher comes down to the one with it
    few, most = min(lines["undistilled"]), max(lines["undistilled"])
    worth = functions_for(lines["undistilled"], lines["distilled"][few]) / few
    words = f"{worth:.1f} times" if math.isfinite(worth) else f"more than {most // few} times"
    axis.set(title=f"a teacher is worth {words} the data", xscale="log")
    axis.set(xlabel="functions trained on", ylabel="held-out bits per byte")
    axis.set_xticks([*lines["undistilled"]], [str(n) for n in lines["undistilled"]])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(folder / "curve.png", dpi=110)
    plt.close(figure)
    as_many = f"what {worth * few:.0f} do" if math.isfinite(worth) else f"more than {most:,} do"
    said = f"With the teacher {few} functions do {as_many} without."
    return f"![bits per byte against functions](curve.png)\n\n{said}"


def functions_for(line: Mapping[int, float], score: float) -> float:
    """How many functions reach a score on a line that is straight in log n; inf where none do."""
    for (n, value), (more, lower) in itertools.pairwise(sorted(line.items())):
        if value <= score:
            return n
        if lower <= score:
            return n * (more / n) ** ((value - score) / (value - lower))
    return math.inf
