"""Use a student: sample, chat, serve, publish."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.commands.app import app
from pipelines.commands.options import (
    Batch,
    Device,
    NewTokens,
    Steps,
    Student,
    sampling_settings,
    takes_sampling,
)
from pipelines.terminal.text import json_line, say
from shared.system.errors import TideError


def _chats(prompts: list[str], file: Path | None) -> list[list[dict[str, Any]]]:
    """From arguments, from a file (`messages`, or a text under `prompt`), else one from standard input."""
    if file is not None:
        from shared.data.prompts import read_prompts

        return read_prompts(file)
    texts = prompts or [_standard_input().strip()]
    return [[{"role": "user", "content": text}] for text in texts]


def _standard_input() -> str:
    """All of it, with line ends as on this machine. TideError where it is not UTF-8."""
    try:
        return re.sub("\r\n?", "\n", sys.stdin.buffer.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TideError(f"standard input is not UTF-8: {error}", fix="write it in UTF-8") from error


@app.command()
@takes_sampling
def sample(
    student: Student,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; none: --file, or standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="JSONL with `prompt` or `messages`; answers come as JSONL.")
    ] = None,
    new_tokens: NewTokens = 256,
    steps_per_block: Steps = None,
    batch: Batch = 8,
    device: Device = "auto",
    *,
    sampling: dict[str, Any],
) -> None:
    """Answer prompts with a student."""
    from student_train.using.load import choose_block, load_for_use

    if batch < 1:
        raise TideError(f"--batch is {batch}", expected="at least 1")
    chats = _chats(prompts or [], file)
    wanted = {"new_tokens": new_tokens, "steps_per_block": steps_per_block, **sampling}
    sampling_settings(**wanted)  # says what is out of range
    loaded = load_for_use(student, device)
    config = sampling_settings(**{**wanted, "block": choose_block(sampling["block"], loaded)})
    for messages, answer in zip(chats, loaded.answer(chats, config, batch), strict=True):
        if file is None:
            say(answer)
        else:
            typer.echo(
                json_line(
                    json.dumps({"messages": messages, "response": answer}, ensure_ascii=False)
                )
            )


@app.command()
@takes_sampling
def chat(
    student: Student,
    new_tokens: NewTokens = 256,
    steps_per_block: Steps = None,
    device: Device = "auto",
    show_diffusion: Annotated[
        bool, typer.Option("--show-diffusion", help="Draw the unmasking.")
    ] = False,
    *,
    sampling: dict[str, Any],
) -> None:
    """Talk to a student in the terminal; blocks appear as they settle. Ctrl-D or an empty line ends it."""
    from pipelines.terminal.chat import talk
    from student_train.using.load import choose_block, load_for_use

    wanted = {"new_tokens": new_tokens, "steps_per_block": steps_per_block, **sampling}
    sampling_settings(**wanted)  # says what is out of range
    loaded = load_for_use(student, device)
    talk(
        loaded,
        sampling_settings(**{**wanted, "block": choose_block(sampling["block"], loaded)}),
        show_diffusion,
    )


@app.command()
@partial(takes_sampling, without=["seed"])  # a request without one gets noise of its own
def serve(
    student: Student,
    host: Annotated[str, typer.Option(help="0.0.0.0: also for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="Of the model, in requests; default: the run's, or the hub id."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="TIDE_API_KEY", help="What requests must carry as a bearer token."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Responses under way at once.")] = 16,
    waiting: Annotated[int, typer.Option(help="Responses that may wait for a place.")] = 256,
    new_tokens: NewTokens = 256,
    steps_per_block: Steps = None,
    device: Device = "auto",
    *,
    sampling: dict[str, Any],
) -> None:
    """Serve a student as OpenAI's API does: /v1/chat/completions, /v1/completions, streamed by block."""
    from pipelines.serving.run import bind, check_installed, served_name
    from pipelines.serving.run import serve as run_server
    from pipelines.serving.settings import ServeConfig
    from student_train.using.load import choose_block, load_for_use

    check_installed()
    wanted = {"new_tokens": new_tokens, "steps_per_block": steps_per_block, **sampling}
    config = ServeConfig(
        name=served_name(student) if name is None else name, sampling=sampling_settings(**wanted), batch=batch,
        waiting=waiting, host=host, port=port, api_key=api_key,
    )  # fmt: skip
    with bind(config) as bound:
        loaded = load_for_use(student, device)
        block = choose_block(sampling["block"], loaded)
        run_server(
            loaded, replace(config, sampling=sampling_settings(**{**wanted, "block": block})), bound
        )


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(help="A run, or a student's folder.")],
    target: Annotated[str, typer.Argument(help="hf://OWNER/NAME.")],
    licence: Annotated[
        str | None, typer.Option("--license", help="Such as apache-2.0; it goes to the card.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="A new repository is private.")
    ] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "A student of tide-distill",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")
    ] = False,
) -> None:
    """Put a student on the hub, with its card, its scores and its licence. Nothing but what its users need is sent."""
    from pipelines.publishing.contents import gather
    from pipelines.publishing.upload import parse_target, upload

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
    say(upload(contents, name, private, message))
