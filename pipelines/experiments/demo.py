"""`make demo`: the main job at the size of a laptop. Caches, students at several seeds, one report.

All students start from the embedded, pre-trained one of their tokenizer, and take the same steps
over the same data in the same order; only the distillation term differs. The undistilled student
trains on the same cache and ignores what it says of the teacher.
"""

import logging
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import polars as pl
import torch

from pipelines.evaluation.use_scores import THRESHOLD, score_use
from pipelines.experiments.ablate import Grid, Variant, train_grid
from pipelines.recipes.read import cache_config, packaged_recipe, read_recipe, train_config
from pipelines.reports.paired import paired_differences, paired_table
from pipelines.reports.report import Run, find_runs, score_cells, to_markdown, write_report
from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import load_model
from shared.system.hardware import describe_hardware
from student_train.training.heldout import (
    masked_nll,
    prepare_heldout,
    student_predictor,
    teacher_predictor,
)
from student_train.using.student import load_for_use
from teacher_cache.teachers.registry import find_teacher

logger = logging.getLogger(__name__)


def demo_grid(seeds: int) -> Grid:
    """The paper's settings for both kinds of teacher, and the best that the ablations found
    (docs/ablations.md), each against the undistilled student of its cache.
    """
    caches, variants = {}, {}
    for kind in ("cross", "shared"):
        recipe = read_recipe(packaged_recipe(f"tiny-{kind}"))
        train, cache = recipe["train"], f"tiny-{kind}"
        caches[cache] = recipe["cache"]
        alone = {**train, "distillation": {"type": "none"}}
        variants[f"undistilled-{kind}"] = Variant(cache, alone)
        variants[f"TIDE-{kind.title()}"] = Variant(cache, train)
    best = read_recipe(packaged_recipe("tiny-shared-best"))["train"]
    variants["best-shared"] = Variant("tiny-shared", best)
    return Grid(caches, variants, tuple(range(seeds)), use=True)


def run_demo(out: Path, seeds: int) -> Path:
    """Caches, students, report. Interrupted and run again, it goes on where it stopped."""
    for name, value in describe_hardware():
        logger.info("%-16s%s", name, value)
    started = time.monotonic()
    grid = demo_grid(seeds)
    train_grid(grid, out)
    minutes = (time.monotonic() - started) / 60
    runs = find_runs(out)
    head = (
        "# Demo: students of the embedded teacher\n\nHeld-out functions at fixed masks, mean ± "
        "spread over seeds. `lines exact`: held-out lines filled in to the letter; `parse`: "
        "sampled functions that are one; `tokens a step`: settled at a time where the student is "
        f"surer than {THRESHOLD}.\n"
    )
    tail = (
        "What they started from, and the teacher, on the same held-out functions and masks:\n\n"
        f"{_start_and_teacher()}\n\n{verdicts(runs, grid)}\n\n{paired_table(runs, grid.pairs())}"
        f"\n\nThis `make demo` took {minutes:.1f} minutes; finished work is not redone. Nats a "
        "token compare students of one cache; bits per byte also compare tokenizers.\n"
    )
    return write_report(out, head, tail)


def verdicts(runs: list[Run], grid: Grid) -> str:
    """One sentence a distilled student: did distillation help, by how much, in every seed?"""
    lines = []
    for base, name in grid.pairs():
        gains = [-x for x in paired_differences(runs, base, name, "nll")]
        if not gains:
            continue
        word = "helped for some seeds only"
        if min(gains) > 0:
            word = "helped"
        elif max(gains) <= 0:
            word = "did not help"
        lines.append(
            f"* **{name}** {word}: held-out NLL {statistics.mean(gains):+.3f} nats a token lower "
            f"than undistilled on average ({', '.join(f'{g:+.3f}' for g in gains)} by seed)."
        )
    return "\n".join(lines)


def _start_and_teacher() -> str:
    """A table of the pre-trained students and the teacher."""
    rows = []
    for kind in ("cross", "shared"):
        recipe = packaged_recipe(f"tiny-{kind}")
        training, lengths = train_config(None, recipe, []), cache_config(None, recipe, []).lengths
        assert training.student.checkpoint is not None and training.heldout is not None
        folder = resolve(training.student.checkpoint)
        student = load_for_use(folder, "cpu")
        heldout = prepare_heldout(training.heldout, lengths, student.tokenizer,
                                  student.special.mask, training.heldout_draws)  # fmt: skip
        predict = student_predictor(student.model, lengths.block)
        scores = masked_nll(student.model, heldout, predict) | asdict(score_use(folder))
        rows.append({"model": f"student {kind}, pre-trained", **score_cells([scores])})
    # the teacher reads the very ids and masks of the last, which shares its tokenizer
    entry = find_teacher("tiny-shared")
    model = load_model(open_checkpoint(resolve(entry.model)), entry.architecture, torch.float32)
    scores = masked_nll(model, heldout, teacher_predictor(model))
    rows.append({"model": "teacher", **score_cells([scores])})
    return to_markdown(pl.DataFrame(rows))
