"""The command `tide`. Heavy imports wait until a command needs them, so that `tide --help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from shared.errors import TideError

_INTERRUPTED = 130

app = typer.Typer(
    name="tide",
    help="Distil diffusion language models: cache a teacher once, train many students from the cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Recipe = Annotated[Path | None, typer.Option("--config", help="A TOML recipe with [cache] and [train] tables.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: section.key=value. Repeatable.")]
TeacherName = Annotated[str | None, typer.Option("--teacher", help="A teacher of `tide teachers`.")]
TeachersFile = Annotated[Path | None, typer.Option("--teachers", help="A TOML file with teachers of your own.")]


@app.command()
def cache(
    teacher: TeacherName = None,
    model: Annotated[str | None, typer.Option(help="Path or hub id of the teacher's weights.")] = None,
    student_tokenizer: Annotated[str | None, typer.Option(help="Path or hub id of the student's tokenizer.")] = None,
    data: Annotated[str | None, typer.Option(help="A file, hf://NAME[:SPLIT], or stdlib:train.")] = None,
    draws: Annotated[int | None, typer.Option(help="Draws of every example; raise it to grow a cache.")] = None,
    out: Annotated[Path | None, typer.Option(help="The cache's folder (default: caches/TEACHER).")] = None,
    config: Recipe = None,
    teachers_file: TeachersFile = None,
    sets: Sets = None,
) -> None:
    """Stage one: run the teacher once and write its knowledge to Parquet shards. Run again to resume."""
    from pipelines.recipes import cache_config
    from teacher_cache.build import build_cache

    extra = [f"noise.draws={draws}"] if draws is not None else []
    extra += [f"data.source={data}"] if data is not None else []
    settings = cache_config(
        teacher,
        config,
        [*extra, *(sets or [])],
        teachers_file,
        model=model,
        student_tokenizer=student_tokenizer,
        out=out,
    )
    report = build_cache(settings)
    counts = report.counts
    typer.echo(
        f"{report.folder}: {report.rows:,} rows, {report.masked:,} masked positions, {report.chunks:,} chunks, "
        f"{report.bytes / 1e6:.1f} MB; {report.computed} shards computed, {report.kept} kept"
    )
    dropped, truncated, lost = (counts[k] for k in ("dropped_long_prompt", "truncated", "unaligned_bytes"))
    typer.echo(f"prompts that fill the length, dropped: {dropped:,}; responses cut: {truncated:,} (rows, all draws)")
    if counts["response_bytes"]:
        share = lost / counts["response_bytes"]
        typer.echo(f"response bytes without alignment: {lost:,} of {counts['response_bytes']:,} ({share:.2%})")


@app.command()
def train(
    teacher: TeacherName = None,
    cache_folder: Annotated[Path | None, typer.Option("--cache", help="A cache (default: caches/TEACHER).")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder (default: runs/TEACHER).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of initial weights and of the order of the data.")] = None,
    config: Recipe = None,
    sets: Sets = None,
) -> None:
    """Stage two: train a student from a cache. Run again to resume."""
    from pipelines.recipes import train_config
    from student_train.trainer import train_student

    settings = train_config(teacher, config, sets or [], cache=cache_folder, out=out, seed=seed)
    metrics = train_student(settings)
    typer.echo(f"{settings.out}/model: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))


teachers_app = typer.Typer(help="List the known teachers, or show one.", invoke_without_command=True)
app.add_typer(teachers_app, name="teachers")


@teachers_app.callback()
def teachers(context: typer.Context, teachers_file: TeachersFile = None) -> None:
    """List the known teachers."""
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console
    from rich.table import Table

    from teacher_cache.teachers.registry import all_teachers

    table = Table("teacher", "model", "architecture", "mask id", "attention", "reads", "length")
    for name, entry in all_teachers(teachers_file).items():
        reads = "the student's ids" if entry.student_tokens else "its own ids"
        mask, length = str(entry.mask_id), str(entry.length)
        table.add_row(name, entry.model, entry.architecture, mask, entry.attention.type, reads, length)
    Console().print(table)


@teachers_app.command()
def show(
    name: Annotated[str, typer.Argument(help="A teacher of `tide teachers`.")], teachers_file: TeachersFile = None
) -> None:
    """Print one teacher's entry, and what loading it checks."""
    from pipelines.show_teacher import describe_teacher

    typer.echo(describe_teacher(name, teachers_file))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A student's folder, such as runs/NAME/model.")],
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    layout: Annotated[str, typer.Option("--format", help="hf (transformers) or a2d (the reference's).")] = "hf",
) -> None:
    """Write a student in another layout; tensors keep every bit."""
    from student_train.export import export_student

    if layout not in ("hf", "a2d"):
        raise TideError(f"unknown format {layout!r}", expected="hf or a2d")
    export_student(source, target, "hf" if layout == "hf" else "a2d")
    typer.echo(f"{target}: {layout}")


@app.command()
def conformance(
    folder: Annotated[Path, typer.Argument(help="A folder of golden numbers.")],
    only: Annotated[str | None, typer.Option(help="losses, masks, alignment or models.")] = None,
) -> None:
    """Recompute reference numbers: does this install reproduce the reference on this hardware?"""
    from pipelines.conformance import run_conformance

    if not run_conformance(folder, only):
        raise typer.Exit(1)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A folder of runs.")]) -> None:
    """Gather the runs below a folder into report.md and report.png."""
    from pipelines.report import write_report

    typer.echo(write_report(folder).read_text())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where caches, runs and the report go.")] = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(help="Seeds of every variant.")] = 3,
) -> None:
    """The whole pipeline on the embedded teacher: two caches, distilled and undistilled students, a report."""
    from pipelines.demo import run_demo

    typer.echo(run_demo(out, seeds).read_text())


@app.command()
def tiny_teacher(
    work: Annotated[Path, typer.Option(help="Checkpoints, to resume from.")] = Path("runs/tiny-teacher"),
    teacher: Annotated[Path, typer.Option(help="Where the teacher goes.")] = Path("teacher_cache/teachers/tiny"),
    student_tokenizer: Annotated[Path, typer.Option(help="Where the other student's tokenizer goes.")] = Path(
        "student_train/tiny_tokenizer"
    ),
) -> None:
    """Train the embedded teacher again (about an hour on 2 cores). Run again to resume."""
    from pipelines.tiny_teacher import TinyTeacherConfig, train_tiny_teacher

    train_tiny_teacher(teacher, student_tokenizer, work, TinyTeacherConfig())


@app.command()
def bench() -> None:
    """Measure, side by side in one run, what the design claims about speed."""
    from pipelines.bench import run_bench

    run_bench()


def main() -> NoReturn:
    """Entry point: errors that a user can mend end in a message and exit code 2, Ctrl-C in 130."""
    try:
        app(standalone_mode=True)
    except TideError as error:
        print(f"tide: error: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            print("\ntide: stopped; what is finished is kept, the same command goes on from there", file=sys.stderr)
        raise
    sys.exit(0)


if __name__ == "__main__":
    main()
