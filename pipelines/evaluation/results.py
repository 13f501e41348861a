"""What `tide eval` leaves: answers as they come, scores and their settings; and their tables.

lm-eval's own cache of answers is a database of pickles, which run code when they are read; a run's
folder may be somebody else's. Here answers are JSON lines.
"""

import hashlib
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pipelines.evaluation.recipe import Benchmark, packaged, paper_benchmarks
from shared.settings.build import read_toml
from shared.system.errors import TideError
from shared.system.files import read_json, refuse_odd, write_bytes


def digest(value: Any) -> str:
    """Names a value of plain kinds."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Answers:
    """What was answered so far, in `path`: an interrupted evaluation goes on where it was.

    Each line has a checksum; lines that were cut or changed count for nothing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        if not path.exists():
            return
        refuse_odd(path)
        with path.open("rb") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                    if row["sum"] == digest([row["key"], row["answer"]]):
                        self._known[row["key"]] = row["answer"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue

    def get(self, kind: str, *question: Any) -> Any:
        """The answer to a question; None where there is none yet."""
        return self._known.get(digest([kind, *question]))

    def add(self, kind: str, question: tuple[Any, ...], answer: Any) -> None:
        """Keep an answer, in memory and on disk. TideError where it cannot be written."""
        key = digest([kind, *question])
        self._known[key] = answer
        row = {"sum": digest([key, answer]), "key": key, "answer": answer}
        try:
            with self._path.open("a") as file:
                # A line before it may have been cut.
                file.write("\n" * (file.tell() > 0) + json.dumps(row))
        except OSError as error:
            raise TideError(
                f"{self._path} cannot be written: {error.strerror}", fix="give another --output"
            ) from error

    def discard(self) -> None:
        """Delete the file: the result is written."""
        self._path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Score:
    """A benchmark's score and standard error, shares in 0 … 1 or in lm-eval's own unit."""

    name: str
    title: str
    metric: str
    value: float
    error: float | None
    rows: int
    limited: bool  # not all rows were asked
    folder: Path
    own_rows: bool = False  # from a file or folder of the user's

    @property
    def mark(self) -> str:
        """A sign for each thing that a reader of the bare number should know."""
        return "*" * self.limited + "†" * self.own_rows

    @property
    def percent(self) -> bool:
        """Whether the value is a share; perplexities and bits per byte are not."""
        return "perplexity" not in self.metric and not self.metric.startswith("bits_per_byte")

    @property
    def shown(self) -> float:
        """The value in per cent, where it is a share."""
        return 100 * self.value if self.percent else self.value


def finished(out: Path, benchmark: Benchmark, settings: dict[str, Any]) -> bool:
    """Whether it is done. TideError, with what differs, where it was done with other settings."""
    path = out / f"{benchmark.name}.json"
    if not path.exists():
        return False
    before = _read(path)["settings"]
    lines = ""
    for key in sorted(before.keys() | settings.keys()):
        if before.get(key) != settings.get(key):
            lines += f"\n    {key}: {before.get(key)!r} there, {settings.get(key)!r} now"
    if lines:
        raise TideError(
            f"{path} holds a result with other settings:{lines}",
            fix="give another --output, or delete that file to measure again",
        )
    return True


def save(
    out: Path,
    benchmark: Benchmark,
    settings: dict[str, Any],
    reported: dict[str, Any],
    **about: Any,
) -> None:
    """Write a benchmark's answers, then its result with `about` in it, each whole or not at all.

    `reported` is what lm-eval returns. TideError where it lacks the benchmark's metric.
    """
    rows = [{"task": task, **row} for task, rows in reported["samples"].items() for row in rows]
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    write_bytes(out / f"{benchmark.name}.samples.jsonl", text.encode())
    measured = reported["results"].get(benchmark.task, {})
    metrics = []
    for key, value in measured.items():
        if "," in key and "_stderr," not in key and isinstance(value, int | float):
            metrics.append(key)
    metric = benchmark.metric or next(iter(metrics), None)
    if metric is None or metric not in metrics:
        raise TideError(
            f"{benchmark.task} reports no {metric or 'score'}; its answers are kept in {out}",
            expected=f"one of its metrics, {', '.join(metrics) or 'of which it has none'}",
            fix=f"name it as `metric` of [{benchmark.name}] in the recipe, or name a group's tasks",
        )
    name, _, kind = metric.partition(",")
    error = measured.get(f"{name}_stderr,{kind}")
    result = {
        "name": benchmark.name, "title": benchmark.title, "metric": metric,
        "value": float(measured[metric]),
        "error": float(error) if isinstance(error, float) else None,
        "rows": len({(row["task"], row["doc_id"]) for row in rows}),
        **about, "settings": settings, "results": reported["results"],
    }  # fmt: skip
    content = json.dumps(result, indent=1, ensure_ascii=False, default=str)
    write_bytes(out / f"{benchmark.name}.json", content.encode())


def read_scores(out: Path) -> list[Score]:
    """The results in a folder, in alphabetical order."""
    scores = []
    for path in sorted(out.glob("*.json")):
        result = _read(path)
        if "metric" not in result or "settings" not in result:
            continue
        values = {key: result[key] for key in ("name", "title", "metric", "value", "error", "rows")}
        limited = result["settings"].get("limit") is not None
        own_rows = result["settings"].get("rows") is not None
        scores.append(Score(**values, limited=limited, folder=out, own_rows=own_rows))
    return scores


def _read(path: Path) -> dict[str, Any]:
    try:
        result = read_json(path, 1 << 30)
    except (OSError, ValueError) as error:
        raise TideError(
            f"{path} cannot be read: {error}", fix="delete it and measure again"
        ) from error
    return result if isinstance(result, dict) else {}


def find_scores(folder: Path) -> dict[str, list[Score]]:
    """The results of `tide eval` below a folder, by run: the folder that holds `eval`."""
    scores = {}
    for place in sorted({path.parent for path in folder.rglob("*.samples.jsonl")}):
        run = place.parent if place.name == "eval" and place != folder else place
        name = folder.name if run == folder else run.relative_to(folder).as_posix()
        if measured := read_scores(place):
            scores[name] = measured
    return scores


def score_table(scores: list[Score]) -> str:
    """One row a benchmark."""
    lines = ["| benchmark | metric | score | ± | rows |", "|---|---|---|---|---|"]
    for score in scores:
        unit, scale = (" %", 100) if score.percent else ("", 1)
        error = "–" if score.error is None else f"{scale * score.error:.2f}"
        cells = [score.title, score.metric, f"{score.shown:.2f}{unit}", error]
        lines.append(f"| {' | '.join(cells)} | {score.rows}{' (limited)' * score.limited} |")
    return "\n".join(lines)


def paper_scores() -> dict[str, dict[str, float]]:
    """The paper's table: row, then benchmark, in per cent."""
    table = read_toml(packaged("paper_scores.toml"))
    names = table["benchmarks"]
    return {row: dict(zip(names, values, strict=True)) for row, values in table["rows"].items()}


def beside_the_paper(measured: dict[str, list[Score]]) -> pl.DataFrame:
    """The paper's rows, then those measured here, over the eight benchmarks and others behind them.

    An average stands only where all eight were scored on all their rows.
    """
    eight = paper_benchmarks()
    titles = {name: benchmark.title for name, benchmark in eight.items()}
    for scores in measured.values():
        titles = {score.name: score.title for score in scores} | titles
    titles = {name: titles[name] for name in [*eight, *(titles.keys() - eight.keys())]}
    rows = [("paper", name, values, {}) for name, values in paper_scores().items()]
    for run, scores in sorted(measured.items()):
        values = {score.name: score.shown for score in scores}
        marks = {score.name: score.mark for score in scores}
        rows.append(("**measured here**", run, values, marks))
    table = []
    for source, name, values, marks in rows:
        cells = dict.fromkeys(titles.values(), "–")
        for key, value in values.items():
            cells[titles[key]] = f"{value:.2f}{marks.get(key, '')}"
        whole = [values[k] for k in eight if k in values and "*" not in marks.get(k, "")]
        average = f"{statistics.mean(whole):.2f}" if len(whole) == len(eight) else "–"
        table.append({"source": source, "student": name, **cells, "average of 8": average})
    return pl.DataFrame(table)
