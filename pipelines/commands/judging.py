"""Judge a student: benchmarks with lm-evaluation-harness."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.commands.app import app
from pipelines.commands.options import (
    Batch,
    Device,
    Student,
    require_positive,
    sampling_settings,
    takes_sampling,
)
from pipelines.terminal.text import say
from shared.system.errors import TideError


@app.command("eval")
@takes_sampling
def evaluate(
    student: Student,
    tasks: Annotated[
        str,
        typer.Option(help="paper (all eight), or names of the recipe or of lm-eval, by commas."),
    ],
    recipe: Annotated[
        Path | None, typer.Option("--config", help="TOML; default: the paper's settings.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Default: beside the model, runs/NAME/eval.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="TASK=PATH: rows of your own. Repeatable.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first rows of each task: for trials.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Default: the recipe's, else the task's.")
    ] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Ask through the chat template.")
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens of a response, at most.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of a whole response.")] = None,
    mc_num: Annotated[int, typer.Option(help="Masks of each block of a likelihood.")] = 32,
    batch: Batch = 8,
    device: Device = "auto",
    confirm_run_unsafe_code: Annotated[
        bool,
        typer.Option("--confirm-run-unsafe-code", help="Run the code that the student writes."),
    ] = False,
    code_seconds: Annotated[float, typer.Option(help="Limit of one program.")] = 10.0,
    code_gigabytes: Annotated[float, typer.Option(help="Limit of one program.")] = 4.0,
    *,
    sampling: dict[str, Any],
) -> None:
    """Score a student on benchmarks. Run again to go on where it stopped."""
    from pipelines.evaluation.data import parse_places
    from pipelines.evaluation.recipe import choose
    from pipelines.evaluation.run import EvalSettings, default_output, run_benchmarks
    from pipelines.evaluation.sandbox.run import Limits
    from pipelines.evaluation.table import score_table

    sampling_settings(**sampling)  # says what is out of range
    wanted = choose(tasks, recipe, shots=num_fewshot, chat=chat, new_tokens=new_tokens, steps=steps)
    for name, value in (
        ("limit", limit),
        ("mc-num", mc_num),
        ("batch", batch),
        ("new-tokens", new_tokens),
        ("steps", steps),
    ):
        if value is not None and value < 1:
            raise TideError(f"--{name} is {value}", expected="at least 1")
    require_positive({"code-seconds": code_seconds, "code-gigabytes": code_gigabytes})
    settings = EvalSettings(
        sampling={"block_size": sampling.pop("block"), "mc_num": mc_num, **sampling},
        batch=batch,
        device=device,
        limit=limit,
        data=parse_places(data or []),
        run_code=confirm_run_unsafe_code,
        limits=Limits(seconds=code_seconds, memory=int(code_gigabytes * 2**30)),
    )
    scores = run_benchmarks(student, wanted, settings, output or default_output(student))
    if os.environ.get("RANK", "0") == "0":
        say(score_table(scores))


@app.command(
    "lm-eval",
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "help_option_names": [],
    },
)
def lm_eval_command(context: typer.Context) -> None:
    """lm-eval's own command line with the model `tide_bd3lm`; code runs within the limits of `tide eval`."""
    from pipelines.evaluation.run import check_installed

    check_installed(quiet=False)
    from lm_eval.__main__ import cli_evaluate

    from pipelines.evaluation.code_eval import code_eval_with_limits
    from pipelines.evaluation.register import register_model

    register_model()
    sys.argv = ["lm_eval", *context.args]
    with code_eval_with_limits():
        cli_evaluate()
