"""What `tide eval` leaves: for each benchmark a JSON file with score and settings, and one with every answer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.evaluation.recipe import Benchmark
from shared.system.atomic import write_bytes
from shared.system.errors import TideError
from shared.system.files import read_json

_LARGEST = 1 << 30
_NOT_SHARES = ("word_perplexity", "byte_perplexity", "perplexity", "bits_per_byte")


@dataclass(frozen=True)
class Score:
    """A benchmark's score: a share in 0 … 1 (or lm-eval's own unit), its standard error, the number of rows."""

    name: str
    title: str
    metric: str
    value: float
    error: float | None
    rows: int
    limited: bool
    """Not all rows were asked."""
    folder: Path
    own_rows: bool = False
    """The rows came from a file or folder of the user's."""

    @property
    def mark(self) -> str:
        """A sign for each thing that a reader of the bare number should know."""
        return "*" * self.limited + "†" * self.own_rows

    @property
    def percent(self) -> bool:
        """Whether the value is a share; perplexities and bits per byte are not."""
        return not self.metric.startswith(_NOT_SHARES)

    @property
    def shown(self) -> float:
        """The value in per cent, where it is a share."""
        return 100 * self.value if self.percent else self.value


def digest(settings: dict[str, Any]) -> str:
    """Names the settings, so that answers of others are never taken for theirs."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def finished(out: Path, benchmark: Benchmark, settings: dict[str, Any]) -> bool:
    """Whether this benchmark is done. TideError, with what differs, where it was done in another way."""
    path = out / f"{benchmark.name}.json"
    if not path.exists():
        return False
    before = _read(path)["settings"]
    differs = sorted(
        key for key in before.keys() | settings.keys() if before.get(key) != settings.get(key)
    )
    if differs:
        lines = "".join(
            f"\n    {key}: {before.get(key)!r} there, {settings.get(key)!r} now" for key in differs
        )
        raise TideError(
            f"{path} holds a result with other settings:{lines}",
            fix="give another --output, or delete that file to measure again",
        )
    return True


def save(
    out: Path,
    benchmark: Benchmark,
    settings: dict[str, Any],
    found: dict[str, Any],
    about: dict[str, float],
) -> None:
    """Write a benchmark's answers, then its result, each whole or not at all. `about` goes in with the result."""
    samples = found.pop("samples", {})
    rows = [{"task": task, **sample} for task, many in samples.items() for sample in many]
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    write_bytes(out / f"{benchmark.name}.samples.jsonl", text.encode())
    measured = found["results"].get(benchmark.task, {})
    scores = [key for key in measured if _is_score(key, measured[key])]
    metric = benchmark.metric or next(iter(scores), None)
    if metric is None or metric not in scores:
        kept = f"{out}/{benchmark.name}.samples.jsonl"
        raise TideError(
            f"{benchmark.task} reports no {metric or 'score'}; its answers are kept in {kept}",
            expected=f"one of {', '.join(scores)}"
            if scores
            else "a task, or a group that adds its tasks up",
            fix=f"name it as `metric` of [{benchmark.name}] in the recipe"
            if scores
            else "name its tasks one by one",
        )
    name, _, kind = metric.partition(",")
    error = measured.get(f"{name}_stderr,{kind}")
    result = {
        "name": benchmark.name,
        "title": benchmark.title,
        "metric": metric,
        "value": float(measured[metric]),
        "error": float(error) if isinstance(error, float) else None,
        "rows": len({(row["task"], row["doc_id"]) for row in rows}),
        **about,
        "settings": settings,
        "results": found["results"],
    }
    content = json.dumps(result, indent=1, ensure_ascii=False, default=str)
    write_bytes(out / f"{benchmark.name}.json", content.encode())


def _is_score(key: str, value: Any) -> bool:
    return "," in key and "_stderr," not in key and isinstance(value, int | float)


def read_scores(out: Path) -> list[Score]:
    """The results in a folder, in alphabetical order."""
    scores = []
    for path in sorted(out.glob("*.json")):
        found = _read(path)
        if "metric" not in found or "settings" not in found:
            continue
        limited = found["settings"].get("limit") is not None
        own_rows = found["settings"].get("rows") is not None
        values = {key: found[key] for key in ("name", "title", "metric", "value", "error", "rows")}
        scores.append(Score(**values, limited=limited, folder=out, own_rows=own_rows))
    return scores


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path, _LARGEST)
    except (OSError, ValueError) as error:
        raise TideError(
            f"{path} cannot be read: {error}", fix="delete it and measure again"
        ) from error
    return found if isinstance(found, dict) else {}
