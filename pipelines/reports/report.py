"""`tide report DIR`: the runs below a folder as one table (polars) and one picture (matplotlib)."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import polars as pl
from matplotlib import pyplot as plt

from pipelines.evaluation.results import Score
from pipelines.evaluation.table import beside_the_paper, find_scores
from pipelines.evaluation.use_scores import UseScores, read_use
from pipelines.recipes.read import train_command
from shared.settings.build import build
from shared.settings.config import TrainConfig
from shared.system.atomic import write_bytes
from shared.system.errors import TideError
from shared.system.files import read_json
from teacher_cache.run.progress import read_status


@dataclass(frozen=True)
class Run:
    """One finished run: its variant (a name that all runs with its settings have, and no others), settings, curves."""

    variant: str
    seed: int
    cache: str
    objective: str
    history: list[dict[str, Any]]
    final: dict[str, float]
    folder: Path
    """Of the cache."""
    command: str
    machine: str
    """The hardware that trained it."""
    use: UseScores | None = None
    """What was measured of the finished student in use."""
    settings: dict[str, Any] = field(default_factory=dict)
    """All but the seed."""
    place: Path = Path()
    """Of the run."""


def describe_objective(settings: dict[str, Any], weight: float = 1.0) -> str:
    """An objective in words, as in `reverse_calm, T 2.0, TIDAL both, weight 2`."""
    if settings["type"] == "none":
        return "CE only"
    text = f"{settings['type']}, T {settings['temperature']}"
    if tidal := settings.get("tidal"):
        text += f", TIDAL {tidal['axis']}" + (
            ", midrange" if tidal.get("timestep_weight") == "midrange" else ""
        )
    return text + (f", weight {weight:g}" if weight != 1.0 else "")


def find_runs(folder: Path) -> list[Run]:
    """The finished runs below `folder`. TideError where there is none."""
    runs = []
    for path in sorted(folder.rglob("history.json")):
        try:
            runs.append(_read_run(path.parent))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, TideError):
                raise
            raise TideError(
                f"{path.parent} is no run that can be read: {type(error).__name__}: {error}",
                expected="run.json and history.json as `tide train` writes them",
                fix="move the folder elsewhere, or train again",
            ) from error
    if not runs:
        raise TideError(
            f"{folder} holds no finished runs",
            expected="folders with run.json and history.json, from `tide train`",
        )
    return _named_by_settings(runs)


def _read_run(folder: Path) -> Run:
    settings, history = read_json(folder / "run.json")["config"], read_json(folder / "history.json")
    build(TrainConfig, settings, f"{folder}/run.json")
    seed = int(settings["seed"])
    return Run(
        folder.name.removesuffix(f"-seed{seed}"),
        seed,
        Path(settings["cache"]).name,
        describe_objective(settings["distillation"], settings["weight"]),
        [{**step} for step in history["steps"]],
        {name: float(value) for name, value in history["final"].items()},
        Path(settings["cache"]),
        train_command(settings),
        str(history.get("machine", "unknown")),
        read_use(folder),
        {name: value for name, value in settings.items() if name != "seed"},
        folder,
    )


def _named_by_settings(runs: list[Run]) -> list[Run]:
    """Runs of one name with different settings get names that tell them apart: their folder's, or a number."""

    for longer in (True, False):
        kinds: dict[str, set[str]] = defaultdict(set)
        for run in runs:
            kinds[run.variant].add(_digest(run))
        changed = []
        for run in runs:
            own, name = sorted(kinds[run.variant]), run.variant
            if len(own) > 1 and longer:
                name = f"{run.place.parent.name}/{name}"
            elif len(own) > 1:
                name = f"{name} #{own.index(_digest(run)) + 1}"
            changed.append(dataclasses.replace(run, variant=name))
        runs = changed
    return runs


def _digest(run: Run) -> str:
    return json.dumps(run.settings, sort_keys=True)


def _spread(values: list[float], digits: int = 3) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def summary_table(runs: list[Run]) -> pl.DataFrame:
    """One row a variant: seeds, held-out masked NLL, bits per byte and top-1 accuracy, what was measured in use (mean ±
    standard deviation), seconds.
    """
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.variant].append(run)
    rows = [
        {
            "student": variant,
            "cache": group[0].cache,
            "objective": group[0].objective,
            "seeds": len(group),
            "held-out NLL (nats/token)": _column(group, "eval_heldout_nll"),
            "bits per byte": _column(group, "eval_heldout_bits_per_byte"),
            "accuracy": _column(group, "eval_heldout_accuracy"),
            **_use_columns(group),
            "training s": f"{statistics.mean(r.final['seconds'] for r in group):.0f}",
        }
        for variant, group in groups.items()
    ]
    return pl.DataFrame(rows).sort("cache", "student")


def cost_table(runs: list[Run]) -> pl.DataFrame:
    """What each cache cost: seconds of the teacher's engine, megabytes, and training seconds of all its students."""
    rows = []
    for folder in sorted({run.folder for run in runs}):
        mine = [run for run in runs if run.folder == folder]
        engine = read_status(folder).get("engine_seconds")
        size = sum(path.stat().st_size for path in folder.glob("draw=*/*.parquet"))
        rows.append(
            {
                "cache": mine[0].cache,
                "teacher s, once": "–" if engine is None else f"{engine:.0f}",
                "MB on disk": f"{size / 1e6:.1f}" if size else "–",
                "students": len(mine),
                "training s, all": f"{sum(r.final['seconds'] for r in mine):.0f}",
            }
        )
    return pl.DataFrame(rows)


def _column(group: list[Run], key: str) -> str:
    values = [run.final[key] for run in group if key in run.final]
    return _spread(values) if values else "–"


def _use_columns(group: list[Run]) -> dict[str, str]:
    found = [run.use for run in group if run.use is not None]
    if not found:
        return {}
    return {
        "lines exact": _spread([use.lines for use in found]),
        "parse": _spread([use.parse for use in found], 2),
        "tokens a step": _spread([use.tokens_per_step for use in found], 2),
    }


def to_markdown(table: pl.DataFrame) -> str:
    """A polars table as Markdown."""
    with pl.Config(
        tbl_formatting="MARKDOWN",
        tbl_hide_column_data_types=True,
        tbl_hide_dataframe_shape=True,
        tbl_rows=-1,
        tbl_cols=-1,
        tbl_width_chars=-1,
        fmt_str_lengths=200,
    ):
        return str(table)


def draw_curves(runs: list[Run], path: Path) -> None:
    """Cross-entropy while training and held-out NLL, one line a variant, the band is the range over seeds."""
    caches = sorted({run.cache for run in runs})
    panels = {
        "denoise": "training cross-entropy, 1/t-weighted",
        "eval_heldout_nll": "held-out masked NLL",
    }
    measured = [
        key for key in panels if any(key in entry for run in runs for entry in run.history)
    ] or ["denoise"]
    width, height = 5.5 * len(measured), 3.6 * len(caches)
    figure, axes = plt.subplots(
        len(caches), len(measured), figsize=(width, height), squeeze=False, layout="constrained"
    )
    for row, cache in zip(axes, caches, strict=True):
        for axis, key in zip(row, measured, strict=True):
            title = panels[key]
            for variant in sorted({run.variant for run in runs if run.cache == cache}):
                _draw_variant(axis, [r for r in runs if r.variant == variant], variant, key)
            axis.set(title=f"{cache}: {title}", xlabel="step", ylabel="nats a token")
            axis.grid(alpha=0.3)
            axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_variant(axis: Any, runs: list[Run], label: str, key: str) -> None:
    curves: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for entry in run.history:
            if key in entry:
                curves[entry["step"]].append(entry[key])
    steps = sorted(curves)
    if not steps:
        return
    (line,) = axis.plot(steps, [statistics.mean(curves[s]) for s in steps], label=label, linewidth=1.4,
                        marker="o" if len(steps) == 1 else None)  # fmt: skip
    axis.fill_between(
        steps,
        [min(curves[s]) for s in steps],
        [max(curves[s]) for s in steps],
        alpha=0.2,
        color=line.get_color(),
    )


def benchmark_section(measured: dict[str, list[Score]]) -> str:
    """Scores of `tide eval` beside the paper's; without any, how to get them."""
    if not measured:
        return "\nNo benchmark was scored yet: `tide eval runs/NAME/model --tasks paper`.\n"
    return (
        "\n## Benchmarks, %\n\nRows of the *paper* are copied from it and are of 0.6B students on GPUs; rows "
        "**measured here** come from `tide eval`. \\* marks a task of which not all rows were asked, † one whose rows "
        "came from a file of yours.\n\n"
        f"{to_markdown(beside_the_paper(measured))}\n"
    )


def write_report(folder: Path, head: str = "", tail: str = "") -> Path:
    """Write `report.md` and `report.png` to `folder`; `head` and `tail` go around the table.

    A folder that holds benchmark scores alone gets these alone.
    """
    measured = find_scores(folder)
    if measured and not any(folder.rglob("history.json")):
        write_bytes(
            folder / "report.md", f"# Scores in {folder}\n{benchmark_section(measured)}".encode()
        )
        return folder / "report.md"
    runs = find_runs(folder)
    draw_curves(runs, folder / "report.png")
    table = to_markdown(summary_table(runs))
    title = head or f"# Runs in {folder}\n"
    commands = {run.variant: run.command for run in reversed(runs)}
    rows = "\n".join(f"* `{variant}`: `{command}`" for variant, command in sorted(commands.items()))
    parts = [
        title,
        table,
        "\n" + to_markdown(cost_table(runs)),
        "\n![loss and held-out NLL](report.png)\n",
        tail,
    ]
    text = (
        "\n".join(part for part in parts if part)
        + f"\n\nThe command of each row, at its first seed:\n\n{rows}\n"
    )
    text += (
        "\nTrained on:\n\n"
        + "\n".join(f"* {machine}" for machine in sorted({run.machine for run in runs}))
        + "\n"
    )
    text += benchmark_section(measured)
    write_bytes(folder / "report.md", text.encode())
    return folder / "report.md"
