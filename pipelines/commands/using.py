"""Use a student: sample, chat."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.commands.app import app
from pipelines.commands.options import Batch, Device, NewTokens, Steps, Student, sampling_settings, takes_sampling
from shared.errors import TideError


def _chats(prompts: list[str], file: Path | None) -> list[list[dict[str, str]]]:
    """From arguments, from JSONL (`messages`, or a text under `prompt`), else one from standard input."""
    if prompts:
        return [[{"role": "user", "content": prompt}] for prompt in prompts]
    if file is None:
        return [[{"role": "user", "content": sys.stdin.read().strip()}]]
    chats = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TideError(f"{file} cannot be read: {error}", expected="a JSONL file") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
            chats.append([{"role": str(m["role"]), "content": str(m["content"])} for m in messages])
        except (ValueError, KeyError, TypeError) as error:
            raise TideError(
                f"{file}, line {number} is no prompt: {line[:80]}",
                expected='{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}',
            ) from error
    return chats


@app.command()
@takes_sampling
def sample(
    student: Student,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; none: --file, or standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="JSONL with `prompt` or `messages`; answers come as JSONL.")] = None,
    new_tokens: NewTokens = 256,
    steps_per_block: Steps = None,
    batch: Batch = 8,
    device: Device = "auto",
    *,
    sampling: dict[str, Any],
) -> None:
    """Answer prompts with a student."""
    from student_train.using.load import load_for_use

    config = sampling_settings(new_tokens=new_tokens, steps_per_block=steps_per_block, **sampling)
    chats = _chats(prompts or [], file)
    loaded = load_for_use(student, device)
    for messages, answer in zip(chats, loaded.answer(chats, config, batch), strict=True):
        if file is None:
            typer.echo(answer)
        else:
            typer.echo(json.dumps({"messages": messages, "response": answer}, ensure_ascii=False))


@app.command()
@takes_sampling
def chat(
    student: Student,
    new_tokens: NewTokens = 256,
    steps_per_block: Steps = None,
    device: Device = "auto",
    show_diffusion: Annotated[bool, typer.Option("--show-diffusion", help="Draw the unmasking.")] = False,
    *,
    sampling: dict[str, Any],
) -> None:
    """Talk to a student in the terminal; blocks appear as they settle. Ctrl-D or an empty line ends it."""
    from pipelines.terminal.chat import talk
    from student_train.using.load import load_for_use

    config = sampling_settings(new_tokens=new_tokens, steps_per_block=steps_per_block, **sampling)
    talk(load_for_use(student, device), config, show_diffusion)
