"""This installation: teachers, environment, demo, speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.app import TeachersFile, app
from pipelines.terminal.text import say
from shared.system.errors import TideError

teachers_app = typer.Typer(
    help="List the known teachers, or show one.", invoke_without_command=True
)
app.add_typer(teachers_app, name="teachers")


@teachers_app.callback()
def teachers(context: typer.Context, teachers_file: TeachersFile = None) -> None:
    """List the known teachers."""
    if context.invoked_subcommand is not None:
        return
    from rich.markup import escape
    from rich.table import Table

    from pipelines.terminal.tables import print_table
    from teacher_cache.teachers.registry import all_teachers

    table = Table("teacher", "model", "architecture", "mask id", "attention", "reads", "length")
    for name, entry in all_teachers(teachers_file).items():
        reads = "the student's ids" if entry.student_tokens else "its own ids"
        mask, length = str(entry.mask_id), str(entry.length)
        cells = (name, entry.model, entry.architecture, mask, entry.attention.type, reads, length)
        table.add_row(*map(escape, cells))  # a name is no markup
    print_table(table)


@teachers_app.command()
def show(
    name: Annotated[str, typer.Argument(help="A teacher of `tide teachers`.")],
    teachers_file: TeachersFile = None,
) -> None:
    """Print one teacher's entry, and what loading it checks."""
    from pipelines.plan.show_teacher import describe_teacher

    say(describe_teacher(name, teachers_file))


recipes_app = typer.Typer(
    help="List the packaged recipes, or show one.", invoke_without_command=True
)
app.add_typer(recipes_app, name="recipes")


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the packaged recipes."""
    if context.invoked_subcommand is not None:
        return
    from pipelines.recipes.read import packaged_recipes
    from pipelines.recipes.show import about

    for name in packaged_recipes():
        say(f"{name:<14}{about(name)}")


@recipes_app.command("show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="A recipe of `tide recipes`, or a TOML file.")],
    against: Annotated[
        str | None, typer.Option(help="Another recipe (default: the paper's run of its kind).")
    ] = None,
) -> None:
    """Print one recipe and its distance from the paper's run, setting by setting."""
    from pipelines.recipes.show import describe_recipe

    say(describe_recipe(name, against))


@app.command()
def env() -> None:
    """Print what numbers and speed depend on: CPU, bfloat16, threads, GPU, versions."""
    from pipelines.terminal.environment import describe_environment

    say("\n".join(describe_environment()))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where caches, runs and the report go.")] = Path(
        "runs/demo"
    ),
    seeds: Annotated[int, typer.Option(help="Seeds of every variant.")] = 3,
) -> None:
    """The whole pipeline on the embedded teacher: two caches, distilled and undistilled students, a report."""
    from pipelines.experiments.demo import run_demo

    say(run_demo(out, seeds).read_text())


@app.command()
def tiny_teacher(
    work: Annotated[Path, typer.Option(help="Checkpoints, to resume from.")] = Path(
        "runs/tiny-teacher"
    ),
    teacher: Annotated[Path, typer.Option(help="Where the teacher goes.")] = Path(
        "teacher_cache/teachers/tiny"
    ),
    student_tokenizer: Annotated[
        Path, typer.Option(help="Where the other student's tokenizer goes.")
    ] = Path("student_train/tiny_tokenizer"),
) -> None:
    """Train the embedded teacher again (about an hour on 2 cores). Run again to resume."""
    from pipelines.tools.tiny_teacher import TinyTeacherConfig, train_tiny_teacher

    train_tiny_teacher(teacher, student_tokenizer, work, TinyTeacherConfig())


@app.command()
def tiny_student(
    out: Annotated[Path, typer.Option(help="Where the students go.")] = Path(
        "student_train/tiny_students"
    ),
    work: Annotated[Path, typer.Option(help="Checkpoints, to resume from.")] = Path(
        "runs/tiny-student"
    ),
    only: Annotated[
        str | None, typer.Option(help="cross or shared: the student of one tokenizer.")
    ] = None,
) -> None:
    """Pre-train the embedded students again, by cross-entropy alone. Run again to resume."""
    from pipelines.tools.tiny_student import TOKENIZERS, TinyStudentConfig, train_tiny_student

    if only is not None and only not in TOKENIZERS:
        raise TideError(f"--only is {only!r}", expected=" or ".join(TOKENIZERS))
    for name, tokenizer in TOKENIZERS.items():
        if only in (None, name):
            train_tiny_student(tokenizer, out / name, work / name, TinyStudentConfig())


@app.command()
def bench(
    only: Annotated[
        str | None, typer.Option(help="One table, such as end-to-end, training or use.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Picture of `use` (default: runs/bench/use.png).")
    ] = None,
) -> None:
    """Measure, side by side in one run, what the design claims about speed."""
    from pipelines.speed import run_bench

    run_bench(only, figure)
