"""Differences between two variants, seed by seed: what a spread over seeds hides."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import polars as pl
from scipy.stats import t as student_t

from pipelines.reports.report import COLUMNS, Run, find_runs, to_markdown
from shared.cache.manifest import differences as settings_that_differ
from shared.system.errors import TideError


def paired_differences(runs: Sequence[Run], base: str, other: str, score: str) -> list[float]:
    """How much more of a score `other` has than `base`, for each seed that both have."""
    sides: dict[str, dict[int, float]] = {base: {}, other: {}}
    for run in runs:
        if run.variant in sides and score in run.scores:
            sides[run.variant][run.seed] = run.scores[score]
    seeds = sorted(sides[base].keys() & sides[other].keys())
    return [sides[other][seed] - sides[base][seed] for seed in seeds]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval (NaN for one seed): Student's t
    over the differences, which are taken to be independent from seed to seed.
    """
    mean, n = statistics.mean(values), len(values)
    if n < 2:
        return mean, math.nan
    return mean, float(student_t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5


def paired_table(runs: Sequence[Run], pairs: Sequence[tuple[str, str]]) -> str:
    """A Markdown table, one row a pair (base, other): other minus base with its interval."""
    rows = []
    for base, other in pairs:
        row = {"student": other, "minus": base, "seeds": 0}
        for title, (score, digits) in COLUMNS.items():
            if not any(score in run.scores for run in runs):
                continue
            values = paired_differences(runs, base, other, score)
            row["seeds"] = max(row["seeds"], len(values))
            row[title] = "–"
            if values:
                mean, half = interval(values)
                text = f"{mean:+.{digits}f}"
                if not math.isnan(half):
                    text += f" ± {half:.{digits}f}"
                row[title] = f"**{text}**" if abs(mean) > half else text
        if row["seeds"]:
            rows.append(row)
    return (
        "Differences, paired by seed, with the 95 % confidence interval of their mean; in bold "
        "where it leaves out zero. Less is better for NLL and bits per byte alone.\n\n"
        + to_markdown(pl.DataFrame(rows))
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
    seeds = [sorted({run.seed for run in side}) for side in sides]
    if not set(seeds[0]) & set(seeds[1]):
        what = f"{one} has the seeds {seeds[0]}, {other} {seeds[1]}"
        raise TideError(what, expected="a seed that both have")
    lines = settings_that_differ(a[0].settings, b[0].settings) or ["nothing but the folder"]
    settings = "\n".join(f"* {line}" for line in lines)
    table = paired_table([*a, *b], [("A", "B")])
    return f"A: {one}\nB: {other}\n\nSettings, A → B:\n\n{settings}\n\n{table}"
