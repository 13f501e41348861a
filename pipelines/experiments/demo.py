"""`make demo`: the main job at the size of a laptop. Two caches, four students, several seeds, one report.

Every student of a tokenizer takes the same number of steps over the same data in the same order; only the
distillation term differs. The undistilled student trains on the same cache and ignores what it says of the teacher.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pipelines.experiments.grid import Job, train_all
from pipelines.recipes.read import cache_config, packaged_recipe, train_config
from pipelines.reports.report import Run, find_runs, gains_by_seed, write_report
from shared.config import DataConfig, LengthConfig
from shared.errors import TideError
from shared.hardware import describe_hardware
from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import load_model
from shared.tokenizers import Tokenizer
from student_train.training.heldout import masked_nll, prepare_heldout, teacher_predictor
from teacher_cache.build import build_cache
from teacher_cache.teachers.registry import find_teacher


@dataclass(frozen=True)
class Variant:
    """A student of the demo: `distilled` False trains with CE alone."""

    name: str
    teacher: str
    distilled: bool


VARIANTS = (
    Variant("undistilled-cross", "tiny-cross", False),
    Variant("TIDE-Cross", "tiny-cross", True),
    Variant("undistilled-shared", "tiny-shared", False),
    Variant("TIDE-Shared", "tiny-shared", True),
)


TEACHERS = ("tiny-cross", "tiny-shared")
_STUDENT = 1.1
"""How long a student takes, two at a time on two cores, in the time that a cache takes: for the time left."""


def run_demo(out: Path, seeds: int) -> Path:
    """Caches, students, report. Interrupted and run again, it goes on where it stopped."""
    if seeds < 1:
        raise TideError(f"seeds is {seeds}", expected="at least 1")
    print("\n".join(f"{name:<16}{value}" for name, value in describe_hardware()), file=sys.stderr)
    started = time.monotonic()
    jobs = [_job(out, variant, seed) for seed in range(seeds) for variant in VARIANTS]
    todo = sum(not job.finished for job in jobs)
    for number, teacher in enumerate(TEACHERS, 1):
        report = build_cache(cache_config(teacher, None, [], out=out / "caches" / teacher))
        if report.computed:
            left = (len(TEACHERS) - number) + todo * _STUDENT
            minutes = (time.monotonic() - started) / number * left / 60
            print(f"{number} of {len(TEACHERS)} caches done, then {todo} students: about {minutes:.0f} min left")
    cached = time.monotonic() - started
    train_all(jobs)
    runs = find_runs(out)
    lengths = cache_config("tiny-shared", None, []).lengths
    training = train_config("tiny-shared", None, [])
    assert training.heldout is not None
    score = score_teacher("tiny-shared", training.heldout, lengths, training.heldout_draws)
    minutes = (time.monotonic() - started) / 60
    tail = (
        f"The embedded teacher itself, on the masks of the tiny-shared students: {score['nll']:.3f} nats a token, "
        f"{score['bits_per_byte']:.3f} bits per byte.\n\n{verdicts(runs)}\n\n"
        f"This `make demo` took {minutes:.1f} minutes, {cached:.0f} s for the caches; finished work is not redone. "
        "Nats a token compare students of one cache; bits per byte also compare tokenizers.\n"
    )
    head = "# Demo: students of the embedded teacher\n\nHeld-out masked NLL at fixed masks, mean ± spread over seeds.\n"
    return write_report(out, head, tail)


def _job(out: Path, variant: Variant, seed: int) -> Job:
    arguments = ["--config", str(packaged_recipe(variant.teacher)), "--seed", str(seed)]
    arguments += ["--cache", str(out / "caches" / variant.teacher)]
    if not variant.distilled:
        arguments += ["--set", 'distillation={type="none"}']
    return Job(out / f"{variant.name}-seed{seed}", tuple(arguments))


def verdicts(runs: list[Run]) -> str:
    """One sentence a pair: did distillation help, by how much against the spread over seeds?"""
    lines = []
    for distilled in (v for v in VARIANTS if v.distilled):
        plain = next(v for v in VARIANTS if v.teacher == distilled.teacher and not v.distilled)
        gains = gains_by_seed(runs, plain.name, distilled.name)
        if not gains:
            continue
        mean = statistics.mean(gains)
        word = "helped" if min(gains) > 0 else "did not help" if max(gains) <= 0 else "helped for some seeds only"
        lines.append(
            f"* **{distilled.name}** {word}: held-out NLL {mean:+.3f} nats a token lower than undistilled on average "
            f"({', '.join(f'{g:+.3f}' for g in gains)} by seed)."
        )
    return "\n".join(lines)


def score_teacher(name: str, data: DataConfig, lengths: LengthConfig, draws: int) -> dict[str, float]:
    """`masked_nll` of a teacher under full attention, on the masks that the students of its tokenizer are scored on."""
    entry = find_teacher(name)
    checkpoint = open_checkpoint(resolve(entry.model))
    model = load_model(checkpoint, entry.architecture, torch.float32)
    heldout = prepare_heldout(data, lengths, Tokenizer.load(checkpoint.folder), entry.mask_id, draws)
    return masked_nll(model, heldout, teacher_predictor(model))
