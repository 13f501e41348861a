"""Stage one: teachers, recipes, prepare, plan, throughput, fidelity, cache."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from pipelines.commands.app import (
    STAGE_ONE,
    Configure,
    TeachersFile,
    app,
    cache_options,
    given,
    require_positive,
    takes,
)
from pipelines.recipes.read import about, describe_recipe, packaged_recipes, train_config
from pipelines.terminal import print_table, say
from shared.system.errors import TideError

teachers_app = typer.Typer(invoke_without_command=True)
recipes_app = typer.Typer(invoke_without_command=True)
app.add_typer(teachers_app, name="teachers", rich_help_panel=STAGE_ONE)
app.add_typer(recipes_app, name="recipes", rich_help_panel=STAGE_ONE)


@teachers_app.callback()
def teachers(context: typer.Context, teachers_file: TeachersFile = None) -> None:
    """List the known teachers, or show one."""
    if context.invoked_subcommand is not None:
        return
    from rich.markup import escape
    from rich.table import Table

    from teacher_cache.teachers.registry import all_teachers

    table = Table("teacher", "model", "architecture", "mask id", "attention", "reads", "length")
    for name, entry in all_teachers(teachers_file).items():
        reads = "the student's ids" if entry.student_tokens else "its own ids"
        cells = (name, entry.model, entry.architecture, entry.mask_id, entry.attention.type, reads)
        table.add_row(*(escape(str(cell)) for cell in (*cells, entry.length)))  # no markup
    print_table(table)


@teachers_app.command("show")
def show_teacher(
    name: Annotated[str, Argument(help="A teacher of `tide teachers`.")],
    teachers_file: TeachersFile = None,
) -> None:
    """Print one teacher's entry, and what loading it checks."""
    from teacher_cache.teachers.registry import find_teacher

    find_teacher(name, teachers_file)  # a misspelt name is answered before torch is imported
    from pipelines.plan.plan import describe_teacher

    say(describe_teacher(name, teachers_file))


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the packaged recipes, or show one."""
    if context.invoked_subcommand is not None:
        return
    for name in packaged_recipes():
        say(f"{name:<18}{about(name)}")


@recipes_app.command("show")
def show_recipe(
    name: Annotated[str, Argument(help="A recipe of `tide recipes`, or a TOML file.")],
    against: Annotated[str | None, Option(help="Another (default: the paper's run).")] = None,
) -> None:
    """Print one recipe and its distance from the paper's run, setting by setting."""
    say(describe_recipe(name, against))


@app.command(rich_help_panel=STAGE_ONE)
@takes("configure", cache_options)
def prepare(
    show: Annotated[int, Option(help="Also print so many examples, answers in ⟦ ⟧.")] = 0,
    *,
    configure: Configure,
) -> None:
    """Render, tokenise and align the data once, and say what became of it. No weight is read."""
    settings = configure()
    from shared.system.hardware import largest_process
    from teacher_cache.prepared.folder import describe
    from teacher_cache.prepared.folder import show as show_examples
    from teacher_cache.run.open import open_sides, prepare_data

    sides = open_sides(settings, weights=False)
    prepared_data, _ = prepare_data(settings, sides)
    say(describe(prepared_data))
    if show > 0:
        say("\n" + show_examples(prepared_data.between(0, show), sides.student))
    say(f"\npeak memory of the largest process: {largest_process() / 2**20:,.0f} MiB")


@app.command(rich_help_panel=STAGE_ONE)
@takes("configure", cache_options)
def plan(
    examples: Annotated[int, Option(min=1, help="Examples in the data.")] = 1_000_000,
    tokens: Annotated[int, Option(min=1, help="Mean tokens of an example.")] = 512,
    response: Annotated[float, Option(max=1, help="The response's share of them.")] = 0.75,
    draws: Annotated[int | None, Option(help="Draws of every example.")] = None,
    tokens_per_second: Annotated[float | None, Option(help="The teacher's, if known.")] = None,
    tflops: Annotated[float | None, Option(help="The card's dense peak, if another.")] = None,
    mfu: Annotated[float, Option(max=1, help="The share of that peak that is reached.")] = 0.35,
    gpu_hour: Annotated[float | None, Option(min=0, help="Price of a GPU hour.")] = None,
    terabyte_month: Annotated[float, Option(min=0, help="Price of a TB for a month.")] = 23.0,
    gpu: Annotated[str, Option(help="h100, h200, a100, 4090 or l40s.")] = "h100",
    train: Annotated[list[str] | None, Option(help="Of stage two: key=value; repeatable.")] = None,
    *,
    configure: Configure,
) -> None:
    """Memory, bytes and GPU hours of both stages, from what you state. Nothing is loaded."""
    require_positive(response=response, tflops=tflops, mfu=mfu, tokens_per_second=tokens_per_second)
    settings = configure(changes={"noise": given(draws=draws)})
    recipe = configure.args[1]  # type: ignore[attr-defined]
    training = train_config(settings.teacher, recipe, train or [], settings.teachers_file)
    from pipelines.plan.plan import Assumptions, find_card, plan_from_statement

    card = find_card(gpu, tflops)
    assumed = Assumptions(card, mfu, tokens_per_second, gpu_hour, terabyte_month)
    say(plan_from_statement(settings, examples, tokens, response, assumed, training))


@app.command(rich_help_panel=STAGE_ONE)
@takes("configure", cache_options)
def throughput(
    length: Annotated[int, Option(min=1, help="Tokens of one pass.")] = 512,
    requests: Annotated[int, Option(min=1, help="Passes in one round.")] = 256,
    rounds: Annotated[int, Option(min=1, help="Rounds; the median counts.")] = 3,
    tflops: Annotated[float | None, Option(help="Dense peak, for utilisation.")] = None,
    *,
    configure: Configure,
) -> None:
    """Measure a teacher's speed and memory here, with random weights of its true shapes."""
    require_positive(tflops=tflops)
    settings = configure()
    from pipelines.plan.plan import measure_throughput

    say(measure_throughput(settings, length, requests, rounds, tflops))


@app.command(rich_help_panel=STAGE_ONE)
@takes("configure", cache_options)
def fidelity(
    student: Annotated[str | None, Option(help="A checkpoint; default: random weights.")] = None,
    k: Annotated[list[int] | None, Option(min=1, help="Default 16, 32, 64.")] = None,
    classes: Annotated[list[int] | None, Option(min=1, help="Default 1 and 64.")] = None,
    tail: Annotated[list[str] | None, Option(help="student or prior; default both.")] = None,
    temperature: Annotated[list[float] | None, Option(help="Default 1 and 2.")] = None,
    objective: Annotated[list[str] | None, Option(help="kl or tidal; default tidal.")] = None,
    examples: Annotated[int, Option(min=1, help="Half of them give the priors.")] = 32,
    *,
    configure: Configure,
) -> None:
    """The angle between a cache's gradient and that of full logits, by k, classes, tail and T.
    Lists are repeated options.
    """
    for value in temperature or ():
        require_positive(temperature=value)
    if wrong := {*(tail or ()), *(objective or ())} - {"student", "prior", "kl", "tidal"}:
        raise TideError(f"--tail or --objective is {wrong.pop()!r}", expected="see --help")
    settings = configure(out=Path("caches/fidelity"), default="tiny-shared")
    from pipelines.plan.fidelity import Grid, measure_fidelity, table
    from shared.settings.config import StudentConfig

    lists = {"ks": k, "classes": classes, "tails": tail, "temperatures": temperature,
             "objectives": objective}  # fmt: skip
    grid = Grid(**{name: values for name, values in lists.items() if values})
    points = measure_fidelity(settings, StudentConfig(checkpoint=student), grid, examples)
    say("\n".join(table(points)))


@app.command(rich_help_panel=STAGE_ONE)
@takes("configure", cache_options)
def cache(
    draws: Annotated[int | None, Option(help="Of every example; raise it to grow.")] = None,
    out: Annotated[Path | None, Option(help="Default: caches/TEACHER.")] = None,
    engine: Annotated[str | None, Option(help="transformers, vllm or auto.")] = None,
    tensor_parallel: Annotated[int | None, Option(help="GPUs of one copy (vllm).")] = None,
    data_parallel: Annotated[int | None, Option(help="Copies, one process each.")] = None,
    rank: Annotated[int | None, Option(help="Of --world runs, this one (from 0).")] = None,
    world: Annotated[int | None, Option(help="How many runs share the work.")] = None,
    store: Annotated[str | None, Option(help="s3://…, gs://…, hf://…: for the shards.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Check all, print costs, stop.")] = False,
    *,
    configure: Configure,
) -> None:
    """Stage one: run the teacher once and write what it knows to shards. Run again to resume."""
    engine_changes = given(
        type=engine, tensor_parallel=tensor_parallel, data_parallel=data_parallel
    )
    changes = {"noise": given(draws=draws), "engine": engine_changes}
    settings = configure(changes=changes, out=out, rank=rank, world=world, store=store)
    if dry_run:
        from pipelines.plan.plan import Assumptions, plan_from_data

        say(plan_from_data(settings, Assumptions()))
        return
    from teacher_cache.run.build import build_cache

    report = build_cache(settings)
    elsewhere = f", {report.elsewhere} elsewhere" if report.elsewhere else ""
    say(
        f"{report.folder}: {report.rows:,} rows, {report.masked:,} masked positions, "
        f"{report.chunks:,} chunks, {report.bytes / 1e6:.1f} MB; "
        f"{report.computed} shards computed, {report.kept} kept{elsewhere}"
    )
    say("\n".join(report.notes))
