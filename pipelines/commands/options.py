"""Options that come in groups, declared once: a command that takes them gets them together."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.system.errors import TideError

if TYPE_CHECKING:
    from student_train.using.settings import SampleConfig

Student = Annotated[str, typer.Argument(help="A student: runs/NAME/model, or a hub id.")]
NewTokens = Annotated[int, typer.Option(help="Tokens of a response, at most.")]
Steps = Annotated[int | None, typer.Option("--steps-per-block", help="Default: one token a step.")]
Batch = Annotated[int, typer.Option(help="Prompts at a time.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]


def _sampling(
    block: Annotated[
        int | None, typer.Option(help="Default: the block that the student was trained with.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Settle all positions above this probability.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(help="Sample from so many of the likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest that have this probability together.")
    ] = 1.0,
    remasking: Annotated[str, typer.Option(help="low_confidence or random.")] = "low_confidence",
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of temperature and random remasking.")] = 0,
) -> None:
    """How a student's tokens are chosen."""


def takes_sampling(
    command: Callable[..., None], without: Sequence[str] = ()
) -> Callable[..., None]:
    """A command whose parameter `sampling` (a dict) is filled by the options of `_sampling`, but those `without`."""
    own, every = (
        inspect.signature(function, eval_str=True).parameters for function in (command, _sampling)
    )
    group = {name: option for name, option in every.items() if name not in without}

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        sampling = {name: values.pop(name) for name in group}
        command(**values, sampling=sampling)

    parameters = [p for name, p in own.items() if name != "sampling"] + list(group.values())
    keyword = inspect.Parameter.KEYWORD_ONLY
    wrapped.__signature__ = inspect.Signature([p.replace(kind=keyword) for p in parameters])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def sampling_settings(**values: Any) -> SampleConfig:
    """Settings of sampling from options; a block that is not given has its default. TideError where one is out of
    range.
    """
    from student_train.using.settings import SampleConfig

    try:
        return SampleConfig(**{k: v for k, v in values.items() if k != "block" or v is not None})
    except ValueError as error:
        raise TideError(str(error)) from error


def require_positive(values: Mapping[str, float | None], may_be_zero: Sequence[str] = ()) -> None:
    """TideError for the first option whose number is not finite, or not positive."""
    for name, value in values.items():
        if value is None or (
            math.isfinite(value) and (value > 0 or (value == 0 and name in may_be_zero))
        ):
            continue
        raise TideError(
            f"--{name} is {value:g}",
            expected="0 or more" if name in may_be_zero else "a positive number",
        )
