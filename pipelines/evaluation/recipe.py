"""Which benchmarks to run, and how: the paper's eight, a TOML file of one's own, or any task of lm-eval by name."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from shared.settings.build import read_toml
from shared.system.errors import TideError

PAPER = "paper"


@dataclass(frozen=True)
class Benchmark:
    """One task of lm-eval and its settings; None leaves the task's own."""

    name: str
    title: str
    task: str
    metric: str | None = None
    """lm-eval's METRIC,FILTER whose value is the score; None: the first that the task reports."""
    shots: int | None = None
    new_tokens: int | None = None
    steps: int | None = None
    chat: bool = True
    """Ask through the chat template."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Changes to the task's configuration."""


def packaged(name: str) -> Path:
    """A file or folder that ships beside this one."""
    return Path(str(resources.files("pipelines"))) / "evaluation" / name


def paper_benchmarks() -> dict[str, Benchmark]:
    """The eight of the paper, by name, in the order of its table."""
    return read_benchmarks(packaged("paper.toml"))


def read_benchmarks(path: Path) -> dict[str, Benchmark]:
    """A TOML file with one table for each benchmark. TideError where a setting is unknown or `task` is missing."""
    known = {f.name for f in fields(Benchmark)} - {"name"}
    found = {}
    for name, values in read_toml(path).items():
        if not isinstance(values, dict) or "task" not in values or set(values) - known:
            extra = sorted(set(values) - known) if isinstance(values, dict) else []
            raise TideError(
                f"{name} in {path} is no benchmark"
                + (f": unknown {', '.join(extra)}" if extra else ""),
                expected=f"a table with `task`, and any of {', '.join(sorted(known - {'task'}))}",
            )
        found[name] = Benchmark(**{"name": name, "title": name, **values})
    return found


def choose(names: str, recipe: Path | None, **changes: Any) -> list[Benchmark]:
    """The benchmarks named, apart by commas: of the recipe (default the paper's), else tasks of lm-eval.

    `paper` or `all` are all of the recipe. `changes` replace each one's own settings where they are not None.
    """
    known = paper_benchmarks() if recipe is None else read_benchmarks(recipe)
    chosen: list[Benchmark] = []
    for name in (part.strip() for part in names.split(",")):
        if name in (PAPER, "all"):
            chosen += known.values()
        elif name:
            chosen.append(known.get(name) or Benchmark(name, name, name, chat=False))
    if not chosen:
        raise TideError(
            "no task is named", expected=f"--tasks paper, or some of {', '.join(known)}"
        )
    given = {key: value for key, value in changes.items() if value is not None}
    return [replace(benchmark, **given) for benchmark in {b.name: b for b in chosen}.values()]
