"""`make demo`: the main job at the size of a laptop. Caches, students at several seeds, one report.

All students start from the embedded, pre-trained one of their tokenizer, and take the same number of steps over the
same data in the same order; only the distillation term differs. The undistilled student trains on the same cache and
ignores what it says of the teacher.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.evaluation.use_scores import THRESHOLD, score_all, score_use
from pipelines.experiments.grid import LOCK, Job, train_all
from pipelines.recipes.read import cache_config, packaged_recipe, train_config
from pipelines.reports.paired import differences, final, paired, paired_table
from pipelines.reports.report import Run, find_runs, write_report
from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import load_model
from shared.settings.config import DataConfig, LengthConfig, TrainConfig
from shared.system.errors import TideError
from shared.system.hardware import describe_hardware
from shared.system.locks import hold
from shared.text.tokenizers import Tokenizer
from student_train.model.student import student_architecture
from student_train.training.heldout import (
    masked_nll,
    prepare_heldout,
    student_predictor,
    teacher_predictor,
)
from teacher_cache.run.build import build_cache
from teacher_cache.teachers.registry import find_teacher


@dataclass(frozen=True)
class Variant:
    """A student of the demo: its recipe, and whether it is distilled or trains with CE alone."""

    name: str
    recipe: str
    distilled: bool = True

    @property
    def cache(self) -> str:
        """Of its cache: a recipe's best settings train from the same one."""
        return self.recipe.removesuffix("-best")


VARIANTS = (
    Variant("undistilled-cross", "tiny-cross", False),
    Variant("TIDE-Cross", "tiny-cross"),
    Variant("undistilled-shared", "tiny-shared", False),
    Variant("TIDE-Shared", "tiny-shared"),
    Variant("best-shared", "tiny-shared-best"),
)
"""The paper's settings, and the best that the ablations found beside them (docs/ablations.md)."""

PAIRS = (
    ("undistilled-cross", "TIDE-Cross"),
    ("undistilled-shared", "TIDE-Shared"),
    ("undistilled-shared", "best-shared"),
)
_STUDENT = 1.1
"""How long a student takes, two at a time on two cores, in the time that a cache takes: for the time left."""


def run_demo(out: Path, seeds: int) -> Path:
    """Caches, students, report. Interrupted and run again, it goes on where it stopped."""
    if seeds < 1:
        raise TideError(f"seeds is {seeds}", expected="at least 1")
    with hold(out / LOCK, f"the folder of runs {out}"):
        return _run(out, seeds)


def _run(out: Path, seeds: int) -> Path:
    print("\n".join(f"{name:<16}{value}" for name, value in describe_hardware()), file=sys.stderr)
    started = time.monotonic()
    jobs = [_job(out, variant, seed) for seed in range(seeds) for variant in VARIANTS]
    todo = sum(not job.finished for job in jobs)
    caches = list(dict.fromkeys(variant.cache for variant in VARIANTS))
    for number, name in enumerate(caches, 1):
        report = build_cache(
            cache_config(None, packaged_recipe(name), [], out=out / "caches" / name)
        )
        if report.computed:
            left = (len(caches) - number) + todo * _STUDENT
            minutes = (time.monotonic() - started) / number * left / 60
            print(
                f"{number} of {len(caches)} caches done, then {todo} students: about {minutes:.0f} min left"
            )
    cached = time.monotonic() - started
    train_all(jobs)
    score_all([job.folder for job in jobs], os.cpu_count() or 1)
    runs = find_runs(out)
    minutes = (time.monotonic() - started) / 60
    tail = (
        f"What they started from, and the teacher, on the same held-out functions and masks:\n\n{_beside()}\n\n"
        f"{verdicts(runs)}\n\n{paired_table(runs, PAIRS)}\n\n"
        f"This `make demo` took {minutes:.1f} minutes, {cached:.0f} s for the caches; finished work is not redone. "
        "Nats a token compare students of one cache; bits per byte also compare tokenizers.\n"
    )
    head = (
        "# Demo: students of the embedded teacher\n\nHeld-out functions at fixed masks, mean ± spread over seeds. "
        "`lines exact`: held-out lines filled in to the letter; `parse`: sampled functions that are one; `tokens a "
        f"step`: settled at a time where the student is surer than {THRESHOLD}.\n"
    )
    return write_report(out, head, tail)


def _job(out: Path, variant: Variant, seed: int) -> Job:
    arguments = ["--config", str(packaged_recipe(variant.recipe)), "--seed", str(seed)]
    arguments += ["--cache", str(out / "caches" / variant.cache)]
    if not variant.distilled:
        arguments += ["--set", 'distillation={type="none"}']
    return Job(out / f"{variant.name}-seed{seed}", tuple(arguments))


def verdicts(runs: list[Run]) -> str:
    """One sentence a distilled student: did distillation help, by how much, in every seed?"""
    lines = []
    for base, name in PAIRS:
        gains = [-x for x in differences(runs, base, name, final("nll"))]
        if not gains:
            continue
        word = (
            "helped"
            if min(gains) > 0
            else "did not help"
            if max(gains) <= 0
            else "helped for some seeds only"
        )
        lines.append(
            f"* **{name}** {word}: held-out NLL {paired(gains).mean:+.3f} nats a token lower than undistilled on "
            f"average ({', '.join(f'{g:+.3f}' for g in gains)} by seed)."
        )
    return "\n".join(lines)


def _beside() -> str:
    """A table of the pre-trained students and the teacher."""
    lines = [
        "| model | NLL | bits per byte | accuracy | lines exact | parse | tokens a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in ("cross", "shared"):
        training = train_config(None, packaged_recipe(f"tiny-{kind}"), [])
        lengths = cache_config(None, packaged_recipe(f"tiny-{kind}"), []).lengths
        assert training.student.checkpoint is not None and training.heldout is not None
        scores = _score_start(training, lengths)
        use = score_use(resolve(training.student.checkpoint))
        lines.append(
            f"| student {kind}, pre-trained | {scores['nll']:.3f} | {scores['bits_per_byte']:.3f} | "
            f"{scores['accuracy']:.3f} | {use.lines:.3f} | {use.parse:.2f} | {use.tokens_per_step:.2f} |"
        )
    found = score_teacher("tiny-shared", training.heldout, lengths, training.heldout_draws)
    lines.append(
        f"| teacher | {found['nll']:.3f} | {found['bits_per_byte']:.3f} | {found['accuracy']:.3f} | – | – | – |"
    )
    return "\n".join(lines)


def _score_start(training: TrainConfig, lengths: LengthConfig) -> dict[str, float]:
    checkpoint = open_checkpoint(resolve(str(training.student.checkpoint)))
    model = load_model(checkpoint, student_architecture(checkpoint), torch.float32)
    tokenizer = Tokenizer.load(checkpoint.folder)
    assert training.heldout is not None
    heldout = prepare_heldout(
        training.heldout, lengths, tokenizer, tokenizer.special_id("mask"), training.heldout_draws
    )
    return masked_nll(model, heldout, student_predictor(model, lengths.block))


def score_teacher(
    name: str, data: DataConfig, lengths: LengthConfig, draws: int
) -> dict[str, float]:
    """`masked_nll` of a teacher under full attention, on the masks that the students of its tokenizer are scored on."""
    entry = find_teacher(name)
    checkpoint = open_checkpoint(resolve(entry.model))
    model = load_model(checkpoint, entry.architecture, torch.float32)
    heldout = prepare_heldout(
        data, lengths, Tokenizer.load(checkpoint.folder), entry.mask_id, draws
    )
    return masked_nll(model, heldout, teacher_predictor(model))
