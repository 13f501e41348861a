"""Which benchmarks there are (the paper's eight, a TOML file of one's own, or any task of lm-eval
by name), their rows, and what `tide eval` leaves: answers as they come, scores, and their tables.
"""

import hashlib
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from shared.settings.build import build, read_toml, strict
from shared.system.files import TideError, explained, read_json, refuse_odd
from student_train.export import one_line

HERE = Path(__file__).parent
_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@strict
class Benchmark:
    """One task of lm-eval and its settings; None leaves the task's own."""

    name: str
    title: str
    task: str
    metric: str | None = None  # METRIC,FILTER of lm-eval; None: the first that the task reports
    shots: int | None = None
    new_tokens: int | None = None
    steps: int | None = None
    chat: bool = True  # ask through the chat template
    overrides: dict[str, Any] = field(default_factory=dict)  # of the task's configuration


def read_benchmarks(path: Path = HERE / "paper.toml") -> dict[str, Benchmark]:
    """A table a benchmark, by name; the paper's eight, in the order of its table, unless told."""
    benchmarks = {}
    for name, values in read_toml(path).items():
        table = {"name": name, "title": name} | (values if isinstance(values, dict) else {})
        benchmarks[name] = build(Benchmark, table, f"{name} in {path}")
    return benchmarks


def choose(names: str, recipe: Path | None, **changes: Any) -> list[Benchmark]:
    """The benchmarks named, apart by commas: of the recipe (default the paper's), else of lm-eval.

    `paper` or `all` are all of the recipe. `changes` replace each one's settings, unless None.
    """
    known = read_benchmarks(recipe or HERE / "paper.toml")
    chosen: dict[str, Benchmark] = {}
    for name in filter(None, map(str.strip, names.split(","))):
        if name in ("paper", "all"):
            chosen |= known
        else:
            chosen[name] = known.get(name) or Benchmark(name, name, name, chat=False)
    if not chosen:
        expected = f"--tasks paper, or some of {', '.join(known)}"
        raise TideError("no task is named", expected=expected)
    given = {key: value for key, value in changes.items() if value is not None}
    return [replace(benchmark, **given) for benchmark in chosen.values()]


def parse_places(texts: Sequence[str]) -> dict[str, Path]:
    """`gsm8k=rows.jsonl` and the like as a table. TideError where one is not, or has no path."""
    places = {}
    for text in texts:
        name, _, place = text.partition("=")
        places[name] = Path(place).expanduser().resolve()
        if not name or not place or not places[name].exists():
            raise TideError(f"--data {text}", expected="TASK=PATH of a file or folder that exists")
    return places


def local_rows(path: Path) -> dict[str, Any]:
    """Settings of a task that reads `path`: a file is its only split; a folder is as on the hub."""
    if path.is_dir():
        return {"dataset_path": str(path)}
    suffix = next((s for s in reversed(path.suffixes) if s in _LOADERS), None)
    if suffix is None:
        expected = f"a name that ends in {', '.join(_LOADERS)}, perhaps .gz"
        raise TideError(f"{path} is no file of rows", expected=expected)
    return {
        "dataset_path": _LOADERS[suffix], "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test", "validation_split": None, "training_split": None,
        "fewshot_split": None,
    }  # fmt: skip


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Answers:
    """What was answered so far, kept in `path`: an interrupted evaluation goes on where it was.

    JSON lines with checksums (lm-eval's own cache has pickles); what was cut or changed is skipped.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        if path is None or not path.exists():
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

    def get(self, kind: str, question: tuple[Any, ...]) -> Any:
        """The answer to a question; None where there is none yet."""
        return self._known.get(digest([kind, *question]))

    def add(self, kind: str, question: tuple[Any, ...], answer: Any) -> None:
        """Keep an answer, in memory and on disk. TideError where it cannot be written."""
        key = digest([kind, *question])
        self._known[key] = answer
        if self._path is not None:
            row = {"sum": digest([key, answer]), "key": key, "answer": answer}
            with explained(self._path), self._path.open("a") as file:
                # A line before it may have been cut
                file.write("\n" * (file.tell() > 0) + json.dumps(row))


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
    own_rows: bool = False  # from a file or folder of the user's

    @property
    def percent(self) -> bool:
        """Whether the value is a share; perplexities and bits per byte are not."""
        return "perplexity" not in self.metric and not self.metric.startswith("bits_per_byte")

    @property
    def shown(self) -> float:
        return 100 * self.value if self.percent else self.value


def read_result(path: Path) -> dict[str, Any]:
    """A benchmark's JSON file. TideError where it is none."""
    try:
        result = read_json(path, 1 << 30)
    except (OSError, ValueError) as error:
        fix = "delete it and measure again"
        raise TideError(f"{path} cannot be read: {error}", fix=fix) from error
    return result if isinstance(result, dict) else {}


def read_scores(out: Path) -> list[Score]:
    """The results in a folder, in alphabetical order."""
    scores = []
    for path in sorted(out.glob("*.json")):
        result = read_result(path)
        if "metric" not in result or "settings" not in result:
            continue
        values = {key: result[key] for key in ("name", "title", "metric", "value", "error", "rows")}
        limited, own_rows = (result["settings"].get(key) is not None for key in ("limit", "rows"))
        scores.append(Score(**values, limited=limited, own_rows=own_rows))
    return scores


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
        named = [one_line(name) for name in (score.title, score.metric)]
        named = [re.sub(r"[^\w .,:+%()/@…-]", "?", name) for name in named]
        cells = [*named, f"{score.shown:.2f}{unit}", error]
        lines.append(f"| {' | '.join(cells)} | {score.rows}{' (limited)' * score.limited} |")
    return "\n".join(lines)


def paper_scores() -> dict[str, dict[str, float]]:
    """The paper's table: row, then benchmark, in per cent."""
    table = read_toml(HERE / "paper_scores.toml")
    names = table["benchmarks"]
    return {row: dict(zip(names, values, strict=True)) for row, values in table["rows"].items()}


def beside_the_paper(measured: dict[str, list[Score]]) -> pl.DataFrame:
    """The paper's rows, then those measured here, over the eight benchmarks and others behind them.

    `*` marks a score on some rows only, `†` one on rows of the user's own. An average stands only
    where all eight were scored on all their rows.
    """
    titles = {name: benchmark.title for name, benchmark in read_benchmarks().items()}
    eight = list(titles)
    rows = [("paper", name, values, {}) for name, values in paper_scores().items()]
    for run, scores in sorted(measured.items()):
        values = {score.name: score.shown for score in scores}
        marks = {score.name: "*" * score.limited + "†" * score.own_rows for score in scores}
        titles = {score.name: score.title for score in scores} | titles
        rows.append(("**measured here**", run, values, marks))
    columns = [*eight, *(name for name in titles if name not in eight)]
    table = []
    for source, name, values, marks in rows:
        cells = {titles[key]: "–" for key in columns}
        for key, value in values.items():
            cells[titles[key]] = f"{value:.2f}{marks.get(key, '')}"
        whole = [values[k] for k in eight if k in values and "*" not in marks.get(k, "")]
        average = f"{statistics.mean(whole):.2f}" if len(whole) == len(eight) else "–"
        table.append({"source": source, "student": name, **cells, "average of 8": average})
    return pl.DataFrame(table)
