"""Differences between two variants, seed by seed: what a spread over seeds hides."""

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

Metric = Callable[[Run], float | None]  # None where it was not measured


@dataclass(frozen=True)
class Paired:
    """The mean, and half the width of its 95 % confidence interval (None for one seed)."""

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
        return Paired(mean, None)
    return Paired(mean, float(student_t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5)


def differences(runs: Sequence[Run], base: str, other: str, metric: Metric) -> list[float]:
    """How much more `other` has than `base`, for each seed that both have."""
    sides: dict[str, dict[int, float]] = {base: {}, other: {}}
    for run in runs:
        if run.variant in sides and (value := metric(run)) is not None:
            sides[run.variant][run.seed] = value
    seeds = sorted(sides[base].keys() & sides[other].keys())
    return [sides[other][seed] - sides[base][seed] for seed in seeds]


def final(name: str) -> Metric:
    """A metric that training wrote, such as `nll` or `accuracy`."""
    return lambda run: run.final.get(f"eval_heldout_{name}")


def use(name: str) -> Metric:
    """A metric of `use.json`, such as `lines`."""
    return lambda run: None if run.use is None else getattr(run.use, name)


# by the words of the table, with the digits that they are given in
METRICS: dict[str, tuple[Metric, int]] = {
    "NLL, nats": (final("nll"), 3),
    "accuracy": (final("accuracy"), 4),
    "mean top p": (final("confidence"), 3),
    "lines exact": (use("lines"), 3),
    "parse": (use("parse"), 3),
    "tokens a step": (use("tokens_per_step"), 2),
}


def paired_table(runs: Sequence[Run], pairs: Sequence[tuple[str, str]]) -> str:
    """A Markdown table, one row a pair (base, other): other minus base with its interval."""
    measured = [
        name for name, (metric, _) in METRICS.items() if any(metric(r) is not None for r in runs)
    ]
    rows = [["student", "minus", "seeds", *measured], ["---"] * (3 + len(measured))]
    for base, other in pairs:
        cells, seeds = [], 0
        for metric, digits in (METRICS[name] for name in measured):
            values = differences(runs, base, other, metric)
            seeds = max(seeds, len(values))
            cells.append(paired(values).text(digits) if values else "–")
        if seeds:
            rows.append([other, base, str(seeds), *cells])
    return (
        "Differences, paired by seed, with the 95 % confidence interval of their mean; in bold "
        "where it leaves out zero. Less is better for NLL alone.\n\n"
        + "\n".join(f"| {' | '.join(row)} |" for row in rows)
    )


def compare(one: Path, other: Path) -> str:
    """Two folders of runs, each of one variant: which settings differ, and the other minus the one.
    TideError where a folder holds several variants, or no seed is in both.
    """
    sides = []
    for name, folder in (("A", one), ("B", other)):
        runs = find_runs(folder)
        if len(variants := sorted({run.variant for run in runs})) > 1:
            raise TideError(
                f"{folder} holds {len(variants)} variants: {', '.join(variants)}",
                expected="runs that differ in their seed alone",
                fix="give the folder of one, or of its seeds",
            )
        sides.append([dataclasses.replace(run, variant=name) for run in runs])
    a, b = sides
    own, others = sorted({run.seed for run in a}), sorted({run.seed for run in b})
    if not set(own) & set(others):
        what = f"{one} has the seeds {own}, {other} {others}"
        raise TideError(what, expected="a seed that both have")
    lines = settings_that_differ(a[0].settings, b[0].settings) or ["nothing but the folder"]
    settings = "\n".join(f"* {line}" for line in lines)
    table = paired_table([*a, *b], [("A", "B")])
    return f"A: {one}\nB: {other}\n\nSettings, A → B:\n\n{settings}\n\n{table}"
