"""Use a student: sample, chat."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.commands.app import app
from shared.errors import TideError

if TYPE_CHECKING:
    from student_train.using.sampler import SampleConfig

Student = Annotated[str, typer.Argument(help="A student: runs/NAME/model, or a hub id.")]
NewTokens = Annotated[int, typer.Option(help="Tokens of a response, at most.")]
Block = Annotated[int, typer.Option(help="Block of the student's block diffusion.")]
Steps = Annotated[int | None, typer.Option("--steps-per-block", help="Default: one token a step.")]
Threshold = Annotated[float | None, typer.Option(help="Settle all positions above this probability.")]
Temperature = Annotated[float, typer.Option(help="0: greedy.")]
Remasking = Annotated[str, typer.Option(help="low_confidence or random.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance.")]
Seed = Annotated[int, typer.Option(help="Of temperature and random remasking.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]


def sampling_settings(**values: Any) -> SampleConfig:
    """Settings of sampling from options. TideError where one is out of range."""
    from student_train.using.sampler import SampleConfig

    try:
        return SampleConfig(**values)
    except ValueError as error:
        raise TideError(str(error)) from error


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
def sample(
    student: Student,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; none: --file, or standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="JSONL with `prompt` or `messages`; answers come as JSONL.")] = None,
    new_tokens: NewTokens = 256,
    block: Block = 32,
    steps_per_block: Steps = None,
    threshold: Threshold = None,
    temperature: Temperature = 0.0,
    remasking: Remasking = "low_confidence",
    guidance: Guidance = 0.0,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    device: Device = "auto",
) -> None:
    """Answer prompts with a student."""
    from student_train.using.load import load_for_use

    config = sampling_settings(
        new_tokens=new_tokens, block=block, steps_per_block=steps_per_block, threshold=threshold,
        temperature=temperature, remasking=remasking, guidance=guidance, seed=seed,
    )  # fmt: skip
    chats = _chats(prompts or [], file)
    loaded = load_for_use(student, device)
    for messages, answer in zip(chats, loaded.answer(chats, config, batch), strict=True):
        if file is None:
            typer.echo(answer)
        else:
            typer.echo(json.dumps({"messages": messages, "response": answer}, ensure_ascii=False))


@app.command()
def chat(
    student: Student,
    new_tokens: NewTokens = 256,
    block: Block = 32,
    steps_per_block: Steps = None,
    threshold: Threshold = None,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    show_diffusion: Annotated[bool, typer.Option("--show-diffusion", help="Draw the unmasking.")] = False,
) -> None:
    """Talk to a student in the terminal; blocks appear as they settle. Ctrl-D or an empty line ends it."""
    from pipelines.terminal.chat import talk
    from student_train.using.load import load_for_use

    config = sampling_settings(
        new_tokens=new_tokens, block=block, steps_per_block=steps_per_block, threshold=threshold,
        temperature=temperature, remasking="low_confidence", guidance=0.0, seed=seed,
    )  # fmt: skip
    talk(load_for_use(student, device), config, show_diffusion)
