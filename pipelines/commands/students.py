"""Use and judge a student: sample, chat, serve, eval, lm-eval, export, publish."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from pipelines.commands.app import app, command, json_line, printable, require_positive, say
from shared.system.files import TideError
from student_train.using.settings import SampleConfig

if TYPE_CHECKING:
    from rich.console import Console

    from student_train.using.student import LoadedStudent

STUDENTS = "Use and judge a student"
Student = Annotated[str, Argument(help="A student: runs/NAME, its model, or a hub id.")]
NewTokens = Annotated[int, Option(min=1, help="Tokens of a response, at most.")]
Steps = Annotated[int | None, Option(help="Default: one token a step.")]
Batch = Annotated[int, Option(min=1, help="Prompts at a time.")]
Device = Annotated[str, Option(help="auto, cpu, cuda, …")]
Unsandboxed = Annotated[bool, Option("--unsandboxed", help="Run code without bubblewrap.")]


def sampling_options(
    block: Annotated[int | None, Option(help="Default: the block of the training.")] = None,
    threshold: Annotated[float | None, Option(help="Settle all surer than this.")] = None,
    temperature: Annotated[float, Option(help="0: greedy.")] = 0.0,
    top_k: Annotated[int | None, Option(help="Sample from so many of the likeliest.")] = None,
    top_p: Annotated[float, Option(help="Sample from the likeliest of this mass.")] = 1.0,
    remasking: Annotated[str, Option(help="low_confidence or random.")] = "low_confidence",
    guidance: Annotated[float, Option(help="Classifier-free guidance.")] = 0.0,
    seed: Annotated[int, Option(help="Of temperature and random remasking.")] = 0,
) -> dict[str, Any]:
    return dict(locals())


def sampling_settings(**values: Any) -> SampleConfig:
    return SampleConfig(**{name: value for name, value in values.items() if value is not None})


def load(student: str, device: str, **options: Any) -> tuple[LoadedStudent, SampleConfig]:
    """The student, and its settings of sampling; what is out of range is said before it loads."""
    config = sampling_settings(**options)
    from student_train.using.student import load_for_use

    loaded = load_for_use(student, device)
    return loaded, replace(config, block=loaded.choose_block(options["block"]))


@command(STUDENTS, sampling=sampling_options)
def sample(
    student: Student,
    sampling: dict[str, Any],
    prompts: Annotated[list[str] | None, Argument(help="Default: standard input.")] = None,
    file: Annotated[Path | None, Option(help="JSONL of `prompt` or `messages`.")] = None,
    new_tokens: NewTokens = 256,
    steps_per_block: Steps = None,
    batch: Batch = 8,
    device: Device = "auto",
) -> None:
    """Answer prompts with a student."""
    if file is not None:
        from shared.data.reading import read_prompts

        chats = read_prompts(file)
    else:
        if not prompts:  # one from standard input, with line ends as on this machine
            try:
                text = sys.stdin.buffer.read().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                what = f"standard input is not UTF-8: {error}"
                raise TideError(what, fix="write it in UTF-8") from error
            prompts = [re.sub("\r\n?", "\n", text).strip()]
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    sampling |= {"new_tokens": new_tokens, "steps_per_block": steps_per_block}
    loaded, config = load(student, device, **sampling)
    for messages, answer in zip(chats, loaded.answer(chats, config, batch), strict=True):
        if file is None:
            say(answer)
        else:
            row = {"messages": messages, "response": answer}
            typer.echo(json_line(json.dumps(row, ensure_ascii=False)))


@command(STUDENTS, sampling=sampling_options)
def chat(
    student: Student,
    sampling: dict[str, Any],
    new_tokens: NewTokens = 256,
    steps_per_block: Steps = None,
    device: Device = "auto",
    show_diffusion: Annotated[bool, Option("--show-diffusion", help="Draw the unmasking.")] = False,
) -> None:
    """Talk to a student; blocks appear as they settle. Ctrl-D or an empty line ends it."""
    sampling |= {"new_tokens": new_tokens, "steps_per_block": steps_per_block}
    from rich.console import Console

    talk(*load(student, device, **sampling), show_diffusion, Console())


def talk(
    student: LoadedStudent, config: SampleConfig, show_diffusion: bool, console: Console
) -> None:
    """Answer questions until there are no more. An answer is drawn after every block, or after
    every step where the diffusion is to be shown, with masked tokens as shaded cells.
    """
    from rich.live import Live
    from rich.text import Text

    from student_train.using.student import sample_steps, until_eos

    special = student.special
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = console.input("[bold]you:[/bold] ").strip()
        except EOFError:
            return
        if not question:
            return
        messages.append({"role": "user", "content": question})
        settled: list[int] = []
        with Live(Text(), console=console, refresh_per_second=30) as live:
            prompt = student.tokenizer.encode_prompt(messages)
            for tokens, _ in sample_steps(student.model, [prompt], special, config):
                row = until_eos(tokens[0], special.eos)
                if special.mask not in tokens[0]:
                    settled = row
                elif not show_diffusion:
                    continue
                drawn = Text()
                for masked, run in itertools.groupby(row, lambda token: token == special.mask):
                    if masked:
                        drawn.append("░" * len([*run]), style="dim")
                    else:
                        drawn.append(printable(student.tokenizer.text([*run])))
                live.update(drawn, refresh=True)
        messages.append({"role": "assistant", "content": student.tokenizer.text(settled)})


@command(STUDENTS, sampling=sampling_options)
def serve(
    student: Student,
    sampling: dict[str, Any],
    host: Annotated[str, Option(help="0.0.0.0: also for other machines.")] = "127.0.0.1",
    port: Annotated[int, Option(help="0: any that is free.")] = 8000,
    name: Annotated[str | None, Option(help="Of the model; default: the run's.")] = None,
    api_key: Annotated[str | None, Option(envvar="TIDE_API_KEY", help="Bearer token.")] = None,
    batch: Annotated[int, Option(help="Responses under way at once.")] = 16,
    waiting: Annotated[int, Option(help="Responses that may wait for a place.")] = 256,
    cors: Annotated[list[str] | None, Option(help="Origins whose pages may ask, or *.")] = None,
    log: Annotated[bool, Option(help="A line for each request, without its text.")] = True,
    new_tokens: NewTokens = 256,
    steps_per_block: Steps = None,
    device: Device = "auto",
) -> None:
    """Serve a student as OpenAI's API does, streamed too; and a page to try it at /."""
    from pipelines.serving.server import ServeConfig, bind, served_name
    from pipelines.serving.server import serve as run_server

    sampling |= {"new_tokens": new_tokens, "steps_per_block": steps_per_block}
    config = ServeConfig(
        name=served_name(student) if name is None else name, sampling=sampling_settings(**sampling),
        batch=batch, waiting=waiting, host=host, port=port, api_key=api_key,
        cors=tuple(cors or ()), log=log,
    )  # fmt: skip
    with bind(config) as bound:
        loaded, chosen = load(student, device, **sampling)
        chosen = replace(chosen, compile=loaded.model.device.type == "cuda")
        run_server(loaded, replace(config, sampling=chosen), bound)


@command(STUDENTS, "eval", sampling=sampling_options)
def evaluate(
    student: Student,
    sampling: dict[str, Any],
    tasks: Annotated[str, Option(help="paper (all eight), or names by commas.")],
    recipe: Annotated[Path | None, Option("--config", help="Default: the paper's.")] = None,
    output: Annotated[Path | None, Option(help="Default: runs/NAME/eval.")] = None,
    data: Annotated[list[str] | None, Option(help="TASK=PATH: rows of your own.")] = None,
    limit: Annotated[int | None, Option(min=1, help="The first rows of each task.")] = None,
    num_fewshot: Annotated[int | None, Option(help="Default: the recipe's.")] = None,
    chat: Annotated[bool | None, Option(help="Ask through the chat template.")] = None,
    new_tokens: Annotated[int | None, Option(min=1, help="Of a response, at most.")] = None,
    steps: Annotated[int | None, Option(min=1, help="Of a whole response.")] = None,
    mc_num: Annotated[int, Option(min=1, help="Masks of each block of a likelihood.")] = 32,
    batch: Batch = 8,
    device: Device = "auto",
    run_code: Annotated[bool, Option("--confirm-run-unsafe-code", help="Run its code.")] = False,
    unsandboxed: Unsandboxed = False,
    code_seconds: Annotated[float, Option(help="Limit of one program.")] = 10.0,
    code_gigabytes: Annotated[float, Option(help="Limit of one program.")] = 4.0,
) -> None:
    """Score a student on benchmarks. Run again to go on where it stopped."""
    require_positive(code_seconds=code_seconds, code_gigabytes=code_gigabytes)
    sampling_settings(**sampling)  # says what is out of range
    from pipelines.evaluation.benchmarks import choose, parse_places, score_table
    from pipelines.evaluation.run import EvalSettings, default_output, run_benchmarks
    from pipelines.evaluation.sandbox import Limits

    wanted = choose(tasks, recipe, shots=num_fewshot, chat=chat, new_tokens=new_tokens, steps=steps)
    how = {"block_size": sampling.pop("block"), "mc_num": mc_num, **sampling}
    limits = Limits(code_seconds, int(code_gigabytes * 2**30), sandboxed=not unsandboxed)
    settings = EvalSettings(
        sampling=how, batch=batch, device=device, limit=limit, data=parse_places(data or []),
        run_code=run_code, limits=limits,
    )  # fmt: skip
    scores = run_benchmarks(student, wanted, settings, output or default_output(student))
    if os.environ.get("RANK", "0") == "0":
        say(score_table(scores))


_PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@app.command("lm-eval", context_settings=_PASSED_ON, rich_help_panel=STUDENTS)
def lm_eval_command(context: typer.Context, unsandboxed: Unsandboxed = False) -> None:
    """lm-eval's own command line with the model `tide_bd3lm`; code runs within our limits."""
    from pipelines.evaluation.run import check_installed, code_eval_with_limits

    check_installed(quiet=False)
    from lm_eval.__main__ import cli_evaluate

    from pipelines.evaluation.model import register_model
    from pipelines.evaluation.sandbox import Limits

    register_model()
    sys.argv = ["lm_eval", *context.args]
    with code_eval_with_limits(Limits(sandboxed=not unsandboxed)):
        cli_evaluate()


@command(STUDENTS)
def export(
    source: Annotated[Path, Argument(help="A student's folder, such as runs/NAME/model.")],
    target: Annotated[Path, Argument(help="A new folder.")],
    layout: Annotated[
        Literal["hf", "a2d", "sdar"],
        Option("--format", help="a2d: the reference's; sdar: for SGLang and LMDeploy."),
    ] = "hf",
) -> None:
    """Write a student in another layout; tensors keep every bit."""
    from student_train.export import export_student

    export_student(source, target, layout)
    say(f"{target}: {layout}")


@command(STUDENTS)
def publish(
    run: Annotated[Path, Argument(help="A run, or a student's folder.")],
    target: Annotated[str, Argument(help="hf://OWNER/NAME.")],
    licence: Annotated[str | None, Option("--license", help="Such as apache-2.0.")] = None,
    private: Annotated[bool, Option("--private", help="If the repository is new.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Say what would be sent.")] = False,
) -> None:
    """Put a student on the hub, with its card, its scores and its licence, and nothing else."""
    from pipelines.publishing import gather, parse_target, upload

    name = parse_target(target)
    contents = gather(run, name, licence)
    for file, size in contents.sizes.items():
        say(f"{file}\t{size:,} bytes")
    if contents.left_out:
        say(f"left out: {', '.join(contents.left_out)}")
    if licence is None:
        say("no licence is stated (--license); it follows from those of teacher, student and data")
    if dry_run:
        say(f"\n{contents.card}\nnothing was sent")
        return
    say(upload(contents, name, private))
