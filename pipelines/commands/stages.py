"""Both stages. Heavy imports wait until a command has checked what it was given."""

import functools
import itertools
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

from pipelines.commands.app import app, command, print_table, require_positive, say
from pipelines.recipes import read as recipe_files
from shared.settings.config import CacheConfig, StudentConfig, TrainConfig
from shared.system.files import TideError
from teacher_cache.teachers.registry import all_teachers, find_teacher

STAGE_ONE, STAGE_TWO = "Stage one: the teacher, once", "Stage two: students"
RecipeFile = Annotated[Path | None, Option("--config", help="TOML: [cache] and [train] tables.")]
Sets = Annotated[list[str] | None, Option("--set", help="section.key=value; repeatable.")]
TeacherName = Annotated[str | None, Option("--teacher", help="A teacher of `tide teachers`.")]
TeachersFile = Annotated[Path | None, Option("--teachers", help="TOML: teachers of your own.")]
Gpu = Literal["h100", "h200", "a100", "4090", "l40s"]
Configure = functools.partial[CacheConfig]
ConfigureTraining = functools.partial[TrainConfig]
teachers_app = typer.Typer(invoke_without_command=True)
recipes_app = typer.Typer(invoke_without_command=True)
app.add_typer(teachers_app, name="teachers", rich_help_panel=STAGE_ONE)
app.add_typer(recipes_app, name="recipes", rich_help_panel=STAGE_ONE)


def cache_options(
    teacher: TeacherName = None,
    model: Annotated[str | None, Option(help="The teacher's weights: a path or hub id.")] = None,
    student_tokenizer: Annotated[str | None, Option(help="A path or hub id.")] = None,
    data: Annotated[str | None, Option(help="A file, hf://OWNER/NAME, … (docs/data.md).")] = None,
    prepared: Annotated[Path | None, Option(help="Default: caches/prepared.")] = None,
    recipe: RecipeFile = None,
    teachers_file: TeachersFile = None,
    sets: Sets = None,
) -> Configure:
    """The settings of stage one, to be completed by what a command changes in them."""
    changes = None if data is None else {"data": {"source": data}}
    own = recipe_files.cache_config, teacher, recipe, sets or [], teachers_file, changes
    named = {"model": model, "student_tokenizer": student_tokenizer, "prepared": prepared}
    return functools.partial(*own, **named)


@teachers_app.callback()
def teachers(context: typer.Context, teachers_file: TeachersFile = None) -> None:
    """List the known teachers, or show one."""
    if context.invoked_subcommand is not None:
        return
    from rich.markup import escape
    from rich.table import Table

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
    find_teacher(name, teachers_file)  # a misspelt name is answered before torch is imported
    from pipelines.plan.plan import describe_teacher

    say(describe_teacher(name, teachers_file))


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the packaged recipes, or show one."""
    if context.invoked_subcommand is not None:
        return
    names = recipe_files.packaged_recipes()
    for name in names:
        say(f"{name:<{max(map(len, names)) + 2}}{recipe_files.about(name)}")


@recipes_app.command("show")
def show_recipe(
    name: Annotated[str, Argument(help="A recipe of `tide recipes`, or a TOML file.")],
) -> None:
    """Print one recipe and its distance from the paper's run, setting by setting."""
    say(recipe_files.describe_recipe(name))


@command(STAGE_ONE, configure=cache_options)
def prepare(
    configure: Configure,
    show: Annotated[int, Option(help="Also print so many examples, answers in ⟦ ⟧.")] = 0,
) -> None:
    """Render, tokenise and align the data once, and say what became of it. No weight is read."""
    settings = configure()
    from teacher_cache.prepared import folder
    from teacher_cache.run.open import open_sides, prepare_data

    sides = open_sides(settings, weights=False)
    prepared_data, _ = prepare_data(settings, sides)
    say(folder.describe(prepared_data))
    if show > 0:
        say("\n" + folder.show(prepared_data.between(0, show), sides.student))


@command(STAGE_ONE, configure=cache_options)
def plan(
    configure: Configure,
    examples: Annotated[int, Option(min=1, help="Examples in the data.")] = 1_000_000,
    tokens: Annotated[int, Option(min=1, help="Mean tokens of an example.")] = 512,
    response: Annotated[float, Option(max=1, help="The response's share of them.")] = 0.75,
    draws: Annotated[int | None, Option(help="Draws of every example.")] = None,
    tokens_per_second: Annotated[float | None, Option(help="The teacher's, if known.")] = None,
    mfu: Annotated[float, Option(max=1, help="The share of the GPU's peak reached.")] = 0.35,
    gpu_hour: Annotated[float | None, Option(min=0, help="Price of a GPU hour.")] = None,
    terabyte_month: Annotated[float, Option(min=0, help="Price of a TB for a month.")] = 23.0,
    gpu: Annotated[Gpu, Option(case_sensitive=False, help="The card.")] = "h100",
    train: Annotated[list[str] | None, Option(help="Of stage two: key=value; repeatable.")] = None,
) -> None:
    """Memory, bytes and GPU hours of both stages, from what you state. Nothing is loaded."""
    require_positive(response=response, mfu=mfu, tokens_per_second=tokens_per_second)
    settings = configure(**{"noise.draws": draws})
    recipe, own = configure.args[1], settings.teachers_file
    training = recipe_files.train_config(settings.teacher, recipe, train or [], own)
    from pipelines.plan.memory import Conversations
    from pipelines.plan.plan import CARDS, Assumptions, plan_from_statement

    assumed = Assumptions(CARDS[gpu], mfu, tokens_per_second, gpu_hour, terabyte_month)
    data = Conversations(tokens, response)
    say(plan_from_statement(settings, examples, data, assumed, training))


@command(STAGE_ONE, configure=cache_options)
def throughput(
    configure: Configure,
    length: Annotated[int, Option(min=4, help="Tokens of one pass.")] = 512,
    requests: Annotated[int, Option(min=1, help="Passes in one round.")] = 256,
    rounds: Annotated[int, Option(min=1, help="Rounds; the median counts.")] = 3,
    tflops: Annotated[float | None, Option(help="Dense peak, for utilisation.")] = None,
) -> None:
    """Measure a teacher's speed and memory here, with random weights of its true shapes."""
    require_positive(tflops=tflops)
    settings = configure()
    from pipelines.plan.plan import measure_throughput

    say(measure_throughput(settings, length, requests, rounds, tflops))


@command(STAGE_ONE, configure=cache_options)
def fidelity(
    configure: Configure,
    student: Annotated[str | None, Option(help="A checkpoint; default: random weights.")] = None,
    k: Annotated[list[int] | None, Option(min=1, help="Default 8.")] = None,
    rank: Annotated[list[int] | None, Option(min=1, help="Default 32, 64, 96.")] = None,
    step: Annotated[list[float] | None, Option(help="Default 0.04.")] = None,
    temperature: Annotated[list[float] | None, Option(help="Default 1 and 2.")] = None,
    objective: Annotated[list[str] | None, Option(help="kl or tidal; default tidal.")] = None,
    examples: Annotated[int, Option(min=1, help="Half of them give the tables.")] = 32,
) -> None:
    """How far a cache is from full logits, by k, rank, step and T. Lists are repeated options."""
    for t, s in itertools.zip_longest(temperature or (), step or ()):
        require_positive(temperature=t, step=s)
    if wrong := set(objective or ()) - {"kl", "tidal"}:
        raise TideError(f"--objective is {wrong.pop()!r}", expected="kl or tidal")
    settings = configure(out=Path("caches/fidelity"), default="tiny-shared")
    from pipelines.plan.fidelity import Grid, measure_fidelity, table

    lists = {"ks": k, "ranks": rank, "steps": step, "temperatures": temperature,
             "objectives": objective}  # fmt: skip
    grid = Grid(**{name: values for name, values in lists.items() if values})
    points = measure_fidelity(settings, StudentConfig(checkpoint=student), grid, examples)
    say("\n".join(table(points)))


@command(STAGE_ONE, configure=cache_options)
def cache(
    configure: Configure,
    draws: Annotated[int | None, Option(help="Of every example; raise it to grow.")] = None,
    out: Annotated[Path | None, Option(help="Default: caches/TEACHER.")] = None,
    engine: Annotated[str | None, Option(help="transformers, vllm or auto.")] = None,
    tensor_parallel: Annotated[int | None, Option(help="GPUs of one copy (vllm).")] = None,
    data_parallel: Annotated[int | None, Option(help="Copies, one process each.")] = None,
    rank: Annotated[int | None, Option(help="Of --world runs, this one (from 0).")] = None,
    world: Annotated[int | None, Option(help="How many runs share the work.")] = None,
    store: Annotated[str | None, Option(help="s3://…, gs://…, hf://…: for the shards.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Check all, print costs, stop.")] = False,
) -> None:
    """Stage one: run the teacher once and write what it knows to shards. Run again to resume."""
    flags = {"noise.draws": draws, "engine.type": engine, "engine.data_parallel": data_parallel,
             "engine.tensor_parallel": tensor_parallel}  # fmt: skip
    settings = configure(out=out, rank=rank, world=world, store=store, **flags)
    if dry_run:
        from pipelines.plan.plan import Assumptions, plan_from_data

        say(plan_from_data(settings, Assumptions()))
        return
    from teacher_cache.run.build import build_cache

    report = build_cache(settings)
    elsewhere = f", {report.elsewhere} elsewhere" if report.elsewhere else ""
    held = f"{report.rows:,} rows, {report.masked:,} masked positions, {report.chunks:,} chunks"
    done = f"{report.computed} shards computed, {report.kept} kept{elsewhere}"
    say(f"{report.folder}: {held}, {report.bytes / 1e6:.1f} MB; {done}")
    say("\n".join(report.notes))


def training_options(
    teacher: TeacherName = None,
    place: Annotated[str | None, Option("--cache", help="Or s3://…; else caches/TEACHER.")] = None,
    seed: Annotated[int | None, Option(help="Of initial weights and the data's order.")] = None,
    recipe: RecipeFile = None,
    teachers_file: TeachersFile = None,
    sets: Sets = None,
) -> ConfigureTraining:
    """The settings of stage two, to be completed by what a command changes in them."""
    flags: dict[str, Any] = {"cache": place, "seed": seed}
    if place is not None and "://" in place:
        folder = Path("caches") / place.rstrip("/").rpartition("/")[2]
        flags |= {"cache": folder, "store": place}
    own = recipe_files.train_config, teacher, recipe, sets or [], teachers_file
    return functools.partial(*own, **flags)


@command(STAGE_TWO, configure=training_options)
def gradients(
    configure: ConfigureTraining,
    temperature: Annotated[list[float] | None, Option(help="Default 0.5, 1, 2 and 4.")] = None,
    weight: Annotated[list[float] | None, Option(help="Default 1, 5 and 20.")] = None,
    rows: Annotated[int, Option(min=1, help="Of the cache, the first that are seen.")] = 256,
) -> None:
    """Before a training: which temperature and weight lead where the held-out loss falls."""
    temperatures, weights = temperature or [0.5, 1.0, 2.0, 4.0], weight or [1.0, 5.0, 20.0]
    for t, w in itertools.zip_longest(temperatures, weights):
        require_positive(temperature=t, weight=w)
    settings = configure()
    from pipelines.plan.gradients import measure_gradients, table

    found = measure_gradients(settings, temperatures, weights, rows)
    say("\n".join(table(found, settings.distillation.type)))


@command(STAGE_TWO, configure=training_options)
def train(
    configure: ConfigureTraining,
    out: Annotated[Path | None, Option(help="Default: runs/TEACHER.")] = None,
) -> None:
    """Stage two: train a student from a cache. Run again to resume."""
    settings = configure(out=out)
    from pipelines.plan.memory import halvings_here
    from student_train.training.trainer import train_student

    metrics = train_student(settings, halvings=halvings_here(settings))
    if int(os.environ.get("RANK", "0")) == 0:
        say(f"{settings.out}/model: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))


@command(STAGE_TWO)
def ablate(
    recipe: Annotated[Path, Argument(help="A grid, such as pipelines/recipes/paper.toml.")],
    out: Annotated[Path | None, Option(help="Default: runs/RECIPE.")] = None,
    at_once: Annotated[int | None, Option(min=1, help="Students at a time.")] = None,
) -> None:
    """Train a grid of variants and seeds over shared caches, and report. Run again to resume."""
    from pipelines.experiments.ablate import run_ablation

    say(run_ablation(recipe, out or Path("runs") / recipe.stem, at_once).read_text())


@command(STAGE_TWO)
def replay(
    run: Annotated[Path, Argument(help="A run that stopped at such a loss.")],
    objective: Annotated[str | None, Option(help="Of your own: module:Class.")] = None,
) -> None:
    """Go to the step whose loss was not finite again, and show where it breaks."""
    from student_train.training.replay import replay as replay_run

    say(replay_run(run, objective))


@command(STAGE_TWO)
def report(folder: Annotated[Path, Argument(help="A folder of runs.")]) -> None:
    """Gather the runs and benchmark scores below a folder into report.md and report.png."""
    from pipelines.experiments.report import write_report

    say(write_report(folder).read_text())


@command(STAGE_TWO)
def compare(
    one: Annotated[Path, Argument(help="A run, or a folder with the seeds of one variant.")],
    other: Annotated[Path, Argument(help="Another.")],
) -> None:
    """Two variants: which settings differ, and differences of their scores, paired by seed."""
    from pipelines.experiments.report import compare as compare_runs

    say(compare_runs(one, other))
