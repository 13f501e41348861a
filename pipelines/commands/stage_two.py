"""Stage two: train, ablate, replay, report, compare."""

import os
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from pipelines.commands.app import STAGE_TWO, RecipeFile, Sets, TeacherName, TeachersFile, app
from pipelines.recipes.read import train_config
from pipelines.terminal import say


@app.command(rich_help_panel=STAGE_TWO)
def train(
    teacher: TeacherName = None,
    cache_place: Annotated[
        str | None, Option("--cache", help="A cache, or s3://… (default: caches/TEACHER).")
    ] = None,
    out: Annotated[Path | None, Option(help="Default: runs/TEACHER.")] = None,
    seed: Annotated[int | None, Option(help="Of initial weights and the data's order.")] = None,
    config: RecipeFile = None,
    teachers_file: TeachersFile = None,
    sets: Sets = None,
) -> None:
    """Stage two: train a student from a cache. Run again to resume."""
    places: dict[str, Any] = {"cache": cache_place}
    if cache_place is not None and "://" in cache_place:
        folder = Path("caches") / cache_place.rstrip("/").rpartition("/")[2]
        places = {"cache": folder, "store": cache_place}
    sets = sets or []
    settings = train_config(teacher, config, sets, teachers_file, **places, out=out, seed=seed)
    from student_train.training.trainer import train_student

    metrics = train_student(settings)
    if int(os.environ.get("RANK", "0")) == 0:
        say(f"{settings.out}/model: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))


@app.command(rich_help_panel=STAGE_TWO)
def ablate(
    recipe: Annotated[Path, Argument(help="A grid, such as pipelines/recipes/paper.toml.")],
    out: Annotated[Path | None, Option(help="Default: runs/RECIPE.")] = None,
    at_once: Annotated[int | None, Option(min=1, help="Students at a time.")] = None,
) -> None:
    """Train a grid of variants and seeds over shared caches, and report. Run again to resume."""
    from pipelines.experiments.ablate import run_ablation

    say(run_ablation(recipe, out or Path("runs") / recipe.stem, at_once).read_text())


@app.command(rich_help_panel=STAGE_TWO)
def replay(run: Annotated[Path, Argument(help="A run that stopped at such a loss.")]) -> None:
    """Go to the step whose loss was not finite again, and show where it breaks."""
    from student_train.training.replay import replay as replay_run

    say(replay_run(run))


@app.command(rich_help_panel=STAGE_TWO)
def report(folder: Annotated[Path, Argument(help="A folder of runs.")]) -> None:
    """Gather the runs and benchmark scores below a folder into report.md and report.png."""
    from pipelines.reports.report import write_report

    say(write_report(folder).read_text())


@app.command(rich_help_panel=STAGE_TWO)
def compare(
    one: Annotated[Path, Argument(help="A run, or a folder with the seeds of one variant.")],
    other: Annotated[Path, Argument(help="Another.")],
) -> None:
    """Two variants: which settings differ, and differences of their scores, paired by seed."""
    from pipelines.reports.paired import compare as compare_runs

    say(compare_runs(one, other))
