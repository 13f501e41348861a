"""Stage two: train, export, report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.commands.app import Recipe, Sets, TeacherName, TeachersFile, app
from pipelines.commands.options import require_positive
from pipelines.terminal.text import say
from shared.system.errors import TideError


@app.command()
def train(
    teacher: TeacherName = None,
    cache_place: Annotated[
        str | None,
        typer.Option(
            "--cache", help="A cache, or s3://…, read shard by shard (default: caches/TEACHER)."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder (default: runs/TEACHER).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of initial weights and of the order of the data.")
    ] = None,
    config: Recipe = None,
    teachers_file: TeachersFile = None,
    sets: Sets = None,
) -> None:
    """Stage two: train a student from a cache. Run again to resume."""
    from pipelines.recipes.read import train_config
    from shared.cache.marked_files import is_remote
    from student_train.training.trainer import train_student

    places: dict[str, Any] = {} if cache_place is None else {"cache": Path(cache_place)}
    if cache_place is not None and is_remote(cache_place):
        places = {
            "cache": Path("caches") / cache_place.rstrip("/").rpartition("/")[2],
            "store": cache_place,
        }
    settings = train_config(
        teacher, config, sets or [], teachers_file, **places, out=out, seed=seed
    )
    metrics = train_student(settings)
    if int(os.environ.get("RANK", "0")) == 0:
        say(f"{settings.out}/model: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))


@app.command()
def ablate(
    recipe: Annotated[Path, typer.Argument(help="A grid, such as pipelines/recipes/paper.toml.")],
    out: Annotated[Path | None, typer.Option(help="Where caches, runs and the report go.")] = None,
    at_once: Annotated[
        int | None, typer.Option(help="Students that train at a time (default: one a core).")
    ] = None,
) -> None:
    """Train a grid of variants and seeds over shared caches, and report. Run again to resume."""
    if at_once is not None:
        require_positive({"at-once": at_once})
    from pipelines.experiments.ablate import run_ablation

    say(run_ablation(recipe, out or Path("runs") / recipe.stem, at_once).read_text())


@app.command()
def fidelity(
    teacher: Annotated[
        str, typer.Option(help="A teacher that shares the student's tokenizer.")
    ] = "tiny-shared",
    student: Annotated[
        str | None, typer.Option(help="A student's checkpoint; default: random weights.")
    ] = None,
    k: Annotated[list[int] | None, typer.Option(help="Repeatable; default 16, 32, 64.")] = None,
    classes: Annotated[
        list[int] | None, typer.Option(help="Of the tail; repeatable; default 1 and 64.")
    ] = None,
    tail: Annotated[
        list[str] | None, typer.Option(help="student or prior; repeatable; default both.")
    ] = None,
    temperature: Annotated[
        list[float] | None, typer.Option(help="Repeatable; default 1 and 2.")
    ] = None,
    objective: Annotated[
        list[str] | None, typer.Option(help="kl or tidal; repeatable; default tidal.")
    ] = None,
    examples: Annotated[
        int, typer.Option(help="Examples of the sample; half of them give the priors.")
    ] = 32,
    model: Annotated[
        str | None, typer.Option(help="Path or hub id of the teacher's weights.")
    ] = None,
    config: Recipe = None,
    teachers_file: TeachersFile = None,
    sets: Sets = None,
) -> None:
    """The angle between the gradient of a cache and that of full logits, for k, classes, shape of the tail and T."""
    from pipelines.plan.fidelity import Grid, measure_fidelity, table
    from pipelines.recipes.read import cache_config
    from shared.settings.config import StudentConfig

    settings = cache_config(
        teacher, config, sets or [], teachers_file, model=model, out=Path("caches/fidelity")
    )
    asked = {
        "ks": k,
        "classes": classes,
        "tails": tail,
        "temperatures": temperature,
        "objectives": objective,
    }
    for name, values, allowed in (
        ("tail", tail, ("student", "prior")),
        ("objective", objective, ("kl", "tidal")),
    ):
        if wrong := set(values or ()) - set(allowed):
            raise TideError(f"--{name} is {wrong.pop()!r}", expected=" or ".join(allowed))
    grid = Grid(**{name: values for name, values in asked.items() if values})
    numbers = [*(("k", v) for v in k or ()), *(("classes", v) for v in classes or ()), ("examples", examples),
               *(("temperature", v) for v in temperature or ())]  # fmt: skip
    for name, value in numbers:
        require_positive({name: value})
    points = measure_fidelity(settings, StudentConfig(checkpoint=student), grid, examples)
    say("\n".join(table(points)))


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="A run that stopped because a loss was not finite.")],
) -> None:
    """Go to the step whose loss was not finite again, and show where it breaks."""
    from student_train.training.replay import replay as replay_run

    say(replay_run(run))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A student's folder, such as runs/NAME/model.")],
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    layout: Annotated[
        str, typer.Option("--format", help="hf (transformers) or a2d (the reference's).")
    ] = "hf",
) -> None:
    """Write a student in another layout; tensors keep every bit."""
    from student_train.model.export import export_student

    if layout not in ("hf", "a2d"):
        raise TideError(f"unknown format {layout!r}", expected="hf or a2d")
    export_student(source, target, "hf" if layout == "hf" else "a2d")
    say(f"{target}: {layout}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A folder of runs.")]) -> None:
    """Gather the runs and benchmark scores below a folder into report.md and report.png."""
    from pipelines.reports.report import write_report

    say(write_report(folder).read_text())


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(help="A run, or a folder with the seeds of one variant.")],
    other: Annotated[Path, typer.Argument(help="Another.")],
) -> None:
    """Two variants: which settings differ, and differences of their scores, paired by seed."""
    from pipelines.reports.paired import compare as compare_runs

    say(compare_runs(one, other))
