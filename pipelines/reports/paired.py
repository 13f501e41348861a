"""Differences between two variants, seed by seed, with a confidence interval: what a spread over seeds hides."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import t as student_t

from pipelines.reports.report import Run, find_runs
from shared.cache.manifest import differences as settings_that_differ
from shared.system.errors import TideError

CONFIDENCE = 0.95
Metric = Callable[[Run], float | None]
"""A number of a run; None where it was not measured."""


@dataclass(frozen=True)
class Paired:
    """`values` by seed, their mean, and half the width of its confidence interval (None for one seed)."""

    values: tuple[float, ...]
    mean: float
    half: float | None

    def text(self, digits: int = 3) -> str:
        """As in `+0.012 ± 0.004`; in bold where the interval leaves out zero."""
        if self.half is None:
            return f"{self.mean:+.{digits}f}"
        words = f"{self.mean:+.{digits}f} ± {self.half:.{digits}f}"
        return f"**{words}**" if abs(self.mean) > self.half else words


def paired(values: Sequence[float]) -> Paired:
    """Student's t over the differences; they are taken to be independent from seed to seed."""
    mean, n = statistics.mean(values), len(values)
    if n < 2:
        return Paired(tuple(values), mean, None)
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, n - 1)) * statistics.stdev(values) / n**0.5
    return Paired(tuple(values), mean, half)


def differences(runs: Sequence[Run], base: str, other: str, metric: Metric) -> list[float]:
    """How much more `other` has than `base`, for each seed that both have."""
    a, b = (
        {r.seed: v for r in runs if r.variant == name and (v := metric(r)) is not None}
        for name in (base, other)
    )
    return [b[seed] - a[seed] for seed in sorted(a.keys() & b.keys())]


def final(name: str) -> Metric:
    """A metric that training wrote, such as `nll` or `accuracy`."""
    return lambda run: run.final.get(f"eval_heldout_{name}")


def use(name: str) -> Metric:
    """A metric of `use.json`, such as `lines`."""
    return lambda run: None if run.use is None else getattr(run.use, name)


METRICS: dict[str, tuple[Metric, int]] = {
    "NLL, nats": (final("nll"), 3),
    "accuracy": (final("accuracy"), 4),
    "mean top p": (final("confidence"), 3),
    "lines exact": (use("lines"), 3),
    "parse": (use("parse"), 3),
    "tokens a step": (use("tokens_per_step"), 2),
}
"""By the words of the table, with the digits that they are given in. Less is better for the first alone."""


def paired_table(runs: Sequence[Run], pairs: Sequence[tuple[str, str]]) -> str:
    """What is shown, and a Markdown table, one row a pair (base, other): other minus base with its interval."""
    measured = {
        name: found
        for name, found in METRICS.items()
        if any(found[0](run) is not None for run in runs)
    }
    lines = [
        "| " + " | ".join(["student", "minus", "seeds", *measured]) + " |",
        "|" + "---|" * (3 + len(measured)),
    ]
    for base, other in pairs:
        cells, seeds = [], 0
        for metric, digits in measured.values():
            values = differences(runs, base, other, metric)
            seeds = max(seeds, len(values))
            cells.append(paired(values).text(digits) if values else "–")
        if seeds:
            lines.append("| " + " | ".join([other, base, str(seeds), *cells]) + " |")
    return (
        "Differences, paired by seed, with the 95 % confidence interval of their mean; in bold where it leaves out "
        "zero. Less is better for NLL alone.\n\n" + "\n".join(lines)
    )


def compare(one: Path, other: Path) -> str:
    """Two folders of runs, each of one variant: which settings differ, and the other minus the one, paired by seed.
    TideError where a folder holds several variants, or no seed is in both.
    """
    sides = []
    for name, folder in (("A", one), ("B", other)):
        runs = find_runs(folder)
        variants = sorted({run.variant for run in runs})
        if len(variants) > 1:
            raise TideError(
                f"{folder} holds {len(variants)} variants: {', '.join(variants)}",
                expected="runs that differ in their seed alone",
                fix="give the folder of one, or of its seeds",
            )
        sides.append([dataclasses.replace(run, variant=name) for run in runs])
    a, b = sides
    shared = {run.seed for run in a} & {run.seed for run in b}
    if not shared:
        raise TideError(
            f"{one} has the seeds {sorted({run.seed for run in a})}, {other} {sorted({run.seed for run in b})}",
            expected="a seed that both have",
        )
    lines = settings_that_differ(a[0].settings, b[0].settings) or ["nothing but the folder"]
    said = "\n".join(f"* {line}" for line in lines)
    return f"A: {one}\nB: {other}\n\nSettings, A → B:\n\n{said}\n\n{paired_table([*a, *b], [('A', 'B')])}"
