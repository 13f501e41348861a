"""The runs below a folder as tables (polars) and one picture (matplotlib), and differences between
two variants, seed by seed: what a spread over seeds hides.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import polars as pl
from matplotlib import pyplot as plt
from scipy.stats import t as student_t

from pipelines.evaluation.benchmarks import beside_the_paper, find_scores
from pipelines.evaluation.use_scores import read_use
from pipelines.recipes.read import train_command
from shared.settings.build import build, differences
from shared.settings.config import TrainConfig
from shared.system.files import TideError, read_json, write_bytes
from student_train.export import one_line

# columns of the tables: the score, and the digits that it is given in
COLUMNS = {
    "held-out NLL (nats/token)": ("nll", 3),
    "bits per byte": ("bits_per_byte", 3),
    "accuracy": ("accuracy", 4),
    "text accuracy": ("text_accuracy", 4),
    "mean top p": ("confidence", 3),
    "lines exact": ("lines", 3),
    "parse": ("parse", 3),
    "tokens a step": ("tokens_per_step", 2),
}


@dataclass(frozen=True)
class Run:
    """One finished run. All runs with its settings have the name of its variant, and no others."""

    variant: str
    seed: int
    settings: dict[str, Any]  # all but the seed, also where the cache is one of a seed's own
    cache: Path
    history: list[dict[str, Any]]
    scores: dict[str, float]  # on held-out examples and, where it was scored, in use
    machine: str  # the hardware that trained it
    place: Path

    @property
    def caches(self) -> str:
        """The name of its cache, and of those that other seeds have instead."""
        return self.settings["cache"]


def find_runs(folder: Path) -> list[Run]:
    """The finished runs below `folder`. TideError where there is none."""
    runs = []
    names: dict[str, str] = {}  # of caches, by their digests: a folder may move, or be made anew
    owners: dict[tuple[str, int | None], str] = {}
    for path in sorted(folder.rglob("history.json")):
        place = path.parent
        try:
            about = read_json(place / "run.json")
            settings = about["config"]
            history = read_json(path)
            known = dict(settings)
            if ":" in settings["distillation"]["type"]:  # a class of someone's own is data here
                known.pop("distillation")
            build(TrainConfig, known, f"{place}/run.json")
            seed, cache = int(settings.pop("seed")), Path(settings["cache"])
            stem = str(cache).removesuffix(f"-{seed}")
            digest, of = str(about.get("cache", stem)), None if stem == str(cache) else seed
            own = one_line(Path(stem).name)
            name, number = own, 1
            while owners.setdefault((name, of), digest) != digest:
                number += 1
                name = f"{own} ({number})"
            settings["cache"] = names.setdefault(digest, name)
            final = history["final"].items()
            scores = {name.removeprefix("eval_heldout_"): float(value) for name, value in final}
            if (use := read_use(place)) is not None:
                scores |= asdict(use)
            machine = one_line(str(history.get("machine", "unknown")))
            steps = [dict(step) for step in history["steps"]]
            name = one_line(place.name.removesuffix(f"-seed{seed}"))
            runs.append(Run(name, seed, settings, cache, steps, scores, machine, place))
        except TideError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{place} is no run that can be read: {type(error).__name__}: {error}"
            raise TideError(what, fix="move the folder elsewhere, or train again") from error
    if not runs:
        raise TideError(f"{folder} holds no finished runs", fix="train one: `tide train --out …`")
    # Runs of one name but different settings are told apart by their folder, then by a number.
    for by_folder in (True, False):
        kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for run in runs:
            if run.settings not in kinds[run.variant]:
                kinds[run.variant].append(run.settings)
        for i, run in enumerate(runs):
            if len(own := kinds[run.variant]) > 1:
                numbered = f"{run.variant} #{own.index(run.settings) + 1}"
                name = f"{run.place.parent.name}/{run.variant}" if by_folder else numbered
                runs[i] = replace(run, variant=name)
    return runs


def summary_table(runs: list[Run]) -> pl.DataFrame:
    """One row a variant: objective, seeds, scores (mean ± standard deviation), seconds."""
    rows = []
    for variant in sorted({run.variant for run in runs}):
        group = [run for run in runs if run.variant == variant]
        # 1. the objective in words, as in `reverse_calm, T 2.0, TIDAL both, weight 2`
        settings = group[0].settings
        objective, words = settings["distillation"], "CE only"
        if objective["type"] != "none":
            words = str(objective["type"])
            if "temperature" in objective:
                words += f", T {objective['temperature']}"
            own = ":" in words
            known = {"type", "temperature", "tidal"}
            words += "".join(f", {k} {v}" for k, v in objective.items() if own and k not in known)
            if isinstance(tidal := objective.get("tidal"), Mapping):
                words += f", TIDAL {tidal.get('axis')}"
                words += ", midrange" if tidal.get("timestep_weight") == "midrange" else ""
            if settings["weight"] != 1.0:
                words += f", weight {settings['weight']:g}"
        row: dict[str, Any] = {"student": variant, "cache": group[0].caches, "objective": words}
        # 2. what was measured of any run
        row |= {"seeds": len(group), **score_cells([run.scores for run in group])}
        row["training s"] = f"{statistics.mean(run.scores['seconds'] for run in group):.0f}"
        rows.append(row)
    nobody_has = [title for title in COLUMNS if all(row[title] == "–" for row in rows)]
    return pl.DataFrame(rows).drop(nobody_has).sort("cache", "student")


def score_cells(group: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """The scores of a variant's seeds by `COLUMNS`: mean ± standard deviation."""
    cells = {}
    for title, (name, digits) in COLUMNS.items():
        values = [scores[name] for scores in group if name in scores]
        cells[title] = f"{statistics.mean(values):.{digits}f}" if values else "–"
        if len(values) > 1:
            cells[title] += f" ± {statistics.stdev(values):.{digits}f}"
    return cells


def to_markdown(table: pl.DataFrame) -> str:
    with pl.Config(tbl_formatting="MARKDOWN", tbl_hide_column_data_types=True, tbl_rows=-1,
                   tbl_cols=-1, tbl_hide_dataframe_shape=True, tbl_width_chars=-1,
                   fmt_str_lengths=200):  # fmt: skip
        return str(table.with_columns(pl.col(pl.String).str.replace_all("|", "\\|", literal=True)))


def draw_curves(runs: list[Run], path: Path) -> None:
    """Cross-entropy while training and held-out NLL: a line a variant, a band over its seeds."""
    titles = {"denoise": "training cross-entropy, 1/t-weighted",
              "eval_heldout_nll": "held-out masked NLL"}  # fmt: skip
    logged = {key for run in runs for entry in run.history for key in entry}
    keys = [key for key in titles if key in logged] or ["denoise"]
    caches = sorted({run.caches for run in runs})
    figure, axes = plt.subplots(len(caches), len(keys), squeeze=False, layout="constrained")
    figure.set_size_inches(5.5 * len(keys), 3.6 * len(caches))
    for row, cache in zip(axes, caches, strict=True):
        for axis, key in zip(row, keys, strict=True):
            for variant in sorted({run.variant for run in runs if run.caches == cache}):
                curves: dict[int, list[float]] = defaultdict(list)
                for run in runs:
                    for entry in run.history if run.variant == variant else ():
                        if key in entry:
                            curves[entry["step"]].append(entry[key])
                if not curves:
                    continue
                steps = sorted(curves)
                means = [statistics.mean(curves[step]) for step in steps]
                (line,) = axis.plot(steps, means, label=variant, linewidth=1.4, marker=".")
                low, high = ([limit(curves[step]) for step in steps] for limit in (min, max))
                axis.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
            axis.set(title=f"{cache}: {titles[key]}", xlabel="step", ylabel="nats a token")
            bottom, top = axis.get_ylim()
            more = max(0.0, 0.1 - (top - bottom)) / 2  # a difference of less fills no figure
            axis.set_ylim(bottom - more, top + more)
            axis.grid(alpha=0.3)
            axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_suffix(suffix), dpi=110)
    plt.close(figure)


def paired_differences(runs: Sequence[Run], base: str, other: str, score: str) -> list[float]:
    """How much more of a score `other` has than `base`, for each seed that both have."""
    scored = {(run.variant, run.seed): run.scores[score] for run in runs if score in run.scores}
    seeds = sorted(seed for variant, seed in scored if variant == base)
    pairs = [(scored[base, seed], scored.get((other, seed))) for seed in seeds]
    return [theirs - ours for ours, theirs in pairs if theirs is not None]


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
                spread = "" if math.isnan(half) else f" ± {half:.{digits}f}"
                text = f"{mean:+.{digits}f}{spread}"
                row[title] = f"**{text}**" if abs(mean) > half else text
        if row["seeds"]:
            rows.append(row)
    head = (
        "Differences, paired by seed, with the 95 % confidence interval of their mean; in bold "
        "where it leaves out zero. Less is better for NLL and bits per byte alone."
    )
    return f"{head}\n\n{to_markdown(pl.DataFrame(rows))}"


def compare(one: Path, other: Path) -> str:
    """Two folders of runs, each of one variant: which settings differ, and the other minus the one.
    TideError where a folder holds several variants, or no seed is in both.
    """
    sides = []
    for name, folder in (("A", one), ("B", other)):
        runs = find_runs(folder)
        if len(variants := sorted({run.variant for run in runs})) > 1:
            what = f"{folder} holds {len(variants)} variants: {', '.join(variants)}"
            raise TideError(what, fix="give the folder of one, or of its seeds")
        sides.append([replace(run, variant=name) for run in runs])
    a, b = sides
    ours, theirs = ({run.seed for run in side} for side in sides)
    if not ours & theirs:
        what = f"{one} has the seeds {sorted(ours)}, {other} {sorted(theirs)}"
        raise TideError(what, expected="a seed that both have")
    lines = differences(a[0].settings, b[0].settings) or ["nothing but the folder"]
    settings = "\n".join(f"* {line}" for line in lines)
    table = paired_table([*a, *b], [("A", "B")])
    return f"A: {one}\nB: {other}\n\nSettings, A → B:\n\n{settings}\n\n{table}"


def write_report(folder: Path, head: str = "", tail: str = "") -> Path:
    """Write `report.md` (`head` and `tail` around its table), its figure and `report.csv`, a row a
    run, to `folder`; of a folder that holds benchmark scores alone, these alone.
    """
    target = folder / "report.md"
    measured = find_scores(folder)
    benchmarks = "\nNo benchmark was scored yet: `tide eval runs/NAME/model --tasks paper`.\n"
    if measured:
        benchmarks = (
            "\n## Benchmarks, %\n\nRows of the *paper* are copied from it and are of 0.6B students "
            "on GPUs; rows **measured here** come from `tide eval`. \\* marks a task of which not "
            "all rows were asked, † one whose rows came from a file of yours.\n\n"
            f"{to_markdown(beside_the_paper(measured))}\n"
        )
    if measured and not any(folder.rglob("history.json")):
        write_bytes(target, f"# Scores in {folder}\n{benchmarks}".encode())
        return target
    runs = find_runs(folder)
    draw_curves(runs, folder / "report.png")
    rows = [{"variant": r.variant, "seed": r.seed, "cache": r.caches, **r.scores} for r in runs]
    write_bytes(folder / "report.csv", pl.DataFrame(rows).write_csv().encode())
    parts = [head or f"# Runs in {folder}\n", f"{to_markdown(summary_table(runs))}\n"]
    parts += ["![loss and held-out NLL](report.png)\n", *([tail] if tail else [])]
    parts.append("\nThe command of each row, at its first seed:\n")
    first = {run.variant: run for run in reversed(runs)}
    for variant, run in sorted(first.items()):
        own = {**run.settings, "cache": str(run.cache), "seed": run.seed}
        command = train_command(own).replace("`", "'").replace("\n", " ")
        parts.append(f"* `{variant}`: `{command}`")
    parts.append("\nTrained on:\n")
    parts += [f"* {machine}" for machine in sorted({run.machine for run in runs})]
    write_bytes(target, "\n".join([*parts, benchmarks]).encode())
    return target
