"""Scores as tables: of one `tide eval`, and of many runs beside the paper's."""

from __future__ import annotations

import statistics
from pathlib import Path

import polars as pl

from pipelines.evaluation.recipe import packaged, paper_benchmarks
from pipelines.evaluation.results import Score, read_scores
from shared.settings.build import read_toml


def score_table(scores: list[Score]) -> str:
    """One row a benchmark."""
    lines = ["| benchmark | metric | score | ± | rows |", "|---|---|---|---|---|"]
    for score in scores:
        unit = " %" if score.percent else ""
        error = "–" if score.error is None else f"{(100 if score.percent else 1) * score.error:.2f}"
        rows = f"{score.rows} (limited)" if score.limited else str(score.rows)
        lines.append(
            f"| {score.title} | {score.metric} | {score.shown:.2f}{unit} | {error} | {rows} |"
        )
    return "\n".join(lines)


def paper_scores() -> dict[str, dict[str, float]]:
    """The paper's table: row, then benchmark, in per cent."""
    found = read_toml(packaged("paper_scores.toml"))
    return {
        row: dict(zip(found["benchmarks"], values, strict=True))
        for row, values in found["rows"].items()
    }


def find_scores(folder: Path) -> dict[str, list[Score]]:
    """The results of `tide eval` below a folder, by run (the folder that holds `eval`, from `folder` on)."""
    places = sorted({path.parent for path in folder.rglob("*.samples.jsonl")})
    found = {_run_name(place, folder): read_scores(place) for place in places}
    return {run: scores for run, scores in found.items() if scores}


def _run_name(place: Path, folder: Path) -> str:
    run = place.parent if place.name == "eval" and place != folder else place
    return folder.name if run == folder else run.relative_to(folder).as_posix()


def beside_the_paper(measured: dict[str, list[Score]]) -> pl.DataFrame:
    """The paper's rows, then those measured here, over the eight benchmarks; the source of each row is its first cell.

    Other benchmarks get columns behind them. An average stands only where all eight were scored on all their rows.
    """
    titles = {name: benchmark.title for name, benchmark in paper_benchmarks().items()}
    others = {
        s.name: s.title for scores in measured.values() for s in scores if s.name not in titles
    }
    rows = [
        _row("paper", name, values, {}, titles | others) for name, values in paper_scores().items()
    ]
    for run, scores in sorted(measured.items()):
        values = {score.name: score.shown for score in scores}
        marks = {score.name: score.mark for score in scores}
        rows.append(_row("**measured here**", run, values, marks, titles | others))
    return pl.DataFrame(rows)


def _row(
    source: str, name: str, values: dict[str, float], marks: dict[str, str], titles: dict[str, str]
) -> dict[str, str]:
    cells = {
        title: f"{values[key]:.2f}{marks.get(key, '')}" if key in values else "–"
        for key, title in titles.items()
    }
    eight = [
        values[key] for key in paper_benchmarks() if key in values and "*" not in marks.get(key, "")
    ]
    average = f"{statistics.mean(eight):.2f}" if len(eight) == len(paper_benchmarks()) else "–"
    return {"source": source, "student": name, **cells, "average of 8": average}
