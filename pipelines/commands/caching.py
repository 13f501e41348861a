"""Stage one: cache, plan, throughput."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.app import Recipe, Sets, TeacherName, TeachersFile, app
from pipelines.commands.options import require_positive
from pipelines.terminal.text import say
from shared.system.errors import TideError

DATA_HELP = (
    "A file, a folder or a glob, hf://OWNER/NAME[:CONFIG][:SPLIT], or stdlib:train (docs/data.md)."
)


@app.command()
def cache(
    teacher: TeacherName = None,
    model: Annotated[
        str | None, typer.Option(help="Path or hub id of the teacher's weights.")
    ] = None,
    student_tokenizer: Annotated[
        str | None, typer.Option(help="Path or hub id of the student's tokenizer.")
    ] = None,
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    prepared: Annotated[
        Path | None, typer.Option(help="Where prepared data lies (default: caches/prepared).")
    ] = None,
    draws: Annotated[
        int | None, typer.Option(help="Draws of every example; raise it to grow a cache.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The cache's folder (default: caches/TEACHER).")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="transformers, vllm, or auto (docs/engines.md).")
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(help="GPUs that share one copy of the teacher (vllm).")
    ] = None,
    data_parallel: Annotated[
        int | None, typer.Option(help="Copies of the teacher, one process each.")
    ] = None,
    engine_workers: Annotated[
        str | None, typer.Option(help="Where the copies run: local, or ray.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of --world runs that share the work, this one (from 0).")
    ] = None,
    world: Annotated[int | None, typer.Option(help="How many runs share the work.")] = None,
    store: Annotated[
        str | None, typer.Option(help="s3://…, gs://…, hf://…: shards are copied there.")
    ] = None,
    metrics_file: Annotated[
        Path | None, typer.Option(help="Progress in Prometheus's text format.")
    ] = None,
    config: Recipe = None,
    teachers_file: TeachersFile = None,
    sets: Sets = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the costs, run nothing.")
    ] = False,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights", help="With --dry-run: neither checkpoint nor data, as `tide plan`."
        ),
    ] = False,
) -> None:
    """Stage one: run the teacher once and write its knowledge to Parquet shards. Run again to resume."""
    from pipelines.plan.plan import Speed, plan_from_data, plan_from_statement
    from pipelines.recipes.command_line import to_toml
    from pipelines.recipes.read import cache_config
    from teacher_cache.run.build import build_cache

    named = {"noise.draws": draws, "engine.type": engine, "engine.tensor_parallel": tensor_parallel,
             "engine.data_parallel": data_parallel, "engine.workers": engine_workers, "rank": rank, "world": world,
             "store": store, "metrics_file": None if metrics_file is None else str(metrics_file)}  # fmt: skip
    extra = [f"{name}={to_toml(value)}" for name, value in named.items() if value is not None]
    flags = {
        "model": model,
        "student_tokenizer": student_tokenizer,
        "out": out,
        "data": data,
        "prepared": prepared,
    }
    settings = cache_config(teacher, config, [*extra, *(sets or [])], teachers_file, **flags)
    if random_weights and not dry_run:
        raise TideError(
            "--random-weights makes no cache worth keeping",
            expected="--random-weights --dry-run",
            fix="use `tide throughput` to measure a teacher with random weights on this machine",
        )
    if dry_run:
        stated = (1_000_000, settings.lengths.student, 0.75, Speed())
        say(
            plan_from_statement(settings, *stated)
            if random_weights
            else plan_from_data(settings, Speed())
        )
        return
    report = build_cache(settings)
    say(
        f"{report.folder}: {report.rows:,} rows, {report.masked:,} masked positions, {report.chunks:,} chunks, "
        f"{report.bytes / 1e6:.1f} MB; {report.computed} shards computed, {report.kept} kept"
        + (f", {report.elsewhere} elsewhere" if report.elsewhere else "")
    )
    say("\n".join(report.notes))


@app.command()
def prepare(
    teacher: TeacherName = None,
    model: Annotated[
        str | None, typer.Option(help="Path or hub id of the teacher's weights.")
    ] = None,
    student_tokenizer: Annotated[
        str | None, typer.Option(help="Path or hub id of the student's tokenizer.")
    ] = None,
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    prepared: Annotated[
        Path | None, typer.Option(help="Where prepared data lies (default: caches/prepared).")
    ] = None,
    show: Annotated[
        int, typer.Option(help="Also print this many examples, trained answers in ⟦ ⟧.")
    ] = 0,
    config: Recipe = None,
    teachers_file: TeachersFile = None,
    sets: Sets = None,
) -> None:
    """Render, tokenise and align the data once, and say what became of it. No weight is read."""
    from pipelines.recipes.read import cache_config
    from shared.system.hardware import largest_process
    from teacher_cache.prepared.report import describe
    from teacher_cache.prepared.report import show as show_examples
    from teacher_cache.run.data import open_sides, prepare_data

    flags = {
        "model": model,
        "student_tokenizer": student_tokenizer,
        "data": data,
        "prepared": prepared,
    }
    settings = cache_config(teacher, config, sets or [], teachers_file, **flags)
    sides = open_sides(settings, weights=False)
    found, _ = prepare_data(settings, sides)
    say(describe(found))
    if show > 0:
        say("\n" + show_examples(found.between(0, show), sides.student))
    say(f"\npeak memory of the largest process: {largest_process() / 2**20:,.0f} MiB")


@app.command()
def plan(
    teacher: TeacherName = None,
    model: Annotated[
        str | None, typer.Option(help="A folder with a config.json (default: sizes on record).")
    ] = None,
    examples: Annotated[int, typer.Option(help="Examples in the data.")] = 1_000_000,
    tokens: Annotated[int, typer.Option(help="Mean tokens of an example.")] = 512,
    response: Annotated[
        float, typer.Option(help="Share of them that belongs to the response.")
    ] = 0.75,
    draws: Annotated[int | None, typer.Option(help="Draws of every example.")] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="The teacher's speed, if you know it.")
    ] = None,
    tflops: Annotated[float, typer.Option(help="The card's dense peak, for GPU hours.")] = 989.0,
    mfu: Annotated[float, typer.Option(help="The share of that peak that is reached.")] = 0.35,
    gpu_hour: Annotated[float | None, typer.Option(help="Price of a GPU hour.")] = None,
    terabyte_month: Annotated[
        float, typer.Option(help="Price of a terabyte on disk for a month.")
    ] = 23.0,
    gpu: Annotated[
        str, typer.Option(help="The card of the rehearsal: h100, h200, a100, 4090 or l40s.")
    ] = "h100",
    config: Recipe = None,
    teachers_file: TeachersFile = None,
    sets: Sets = None,
) -> None:
    """Memory, bytes and GPU hours of both stages, from sizes on record and what you state. Nothing is loaded."""
    from pipelines.plan.cards import find_card
    from pipelines.plan.plan import Prices, Speed, plan_from_statement
    from pipelines.plan.rehearse import summarise_rehearsal
    from pipelines.plan.work import Conversations
    from pipelines.recipes.read import cache_config, train_config

    positive = {
        "examples": examples, "tokens": tokens, "response": response, "tflops": tflops, "mfu": mfu,
        "tokens-per-second": tokens_per_second, "gpu-hour": gpu_hour, "terabyte-month": terabyte_month,
    }  # fmt: skip
    require_positive(positive, may_be_zero=("gpu-hour", "terabyte-month"))
    for name, share in (("response", response), ("mfu", mfu)):
        if share > 1:
            raise TideError(f"--{name} is {share:g}", expected="a share, from 0 to 1")
    extra = [f"noise.draws={draws}"] if draws is not None else []
    settings = cache_config(teacher, config, [*extra, *(sets or [])], teachers_file, model=model)
    prices = None if gpu_hour is None else Prices(gpu_hour, terabyte_month)
    speed = Speed(tokens_per_second, tflops, mfu)
    card = find_card(gpu)
    say(plan_from_statement(settings, examples, tokens, response, speed, prices))
    training = train_config(settings.teacher, config, [], teachers_file)
    say(summarise_rehearsal(settings, training, Conversations(tokens, response), examples, card))


@app.command()
def throughput(
    teacher: TeacherName = None,
    model: Annotated[
        str | None, typer.Option(help="A folder with a config.json (default: sizes on record).")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of one pass.")] = 512,
    requests: Annotated[int, typer.Option(help="Passes in one round.")] = 256,
    rounds: Annotated[int, typer.Option(help="Rounds; the median counts.")] = 3,
    tflops: Annotated[
        float | None, typer.Option(help="The card's dense peak, for utilisation.")
    ] = None,
    config: Recipe = None,
    teachers_file: TeachersFile = None,
    sets: Sets = None,
) -> None:
    """Measure a teacher's speed and memory on this machine, with random weights of its true shapes."""
    from pipelines.plan.throughput import measure_throughput
    from pipelines.recipes.read import cache_config

    require_positive({"length": length, "requests": requests, "rounds": rounds, "tflops": tflops})
    settings = cache_config(teacher, config, sets or [], teachers_file, model=model)
    say(measure_throughput(settings, length, requests, rounds, tflops))
