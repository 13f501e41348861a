"""The Typer application, the panels of its help, and the options that several commands share."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from pipelines.recipes.read import cache_config
from shared.settings.config import CacheConfig
from shared.system.errors import TideError

if TYPE_CHECKING:
    from student_train.using.settings import SampleConfig

Configure = Callable[..., CacheConfig]
app = typer.Typer(
    name="tide",
    help="Distil diffusion language models: cache a teacher once, train many students from it.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # "rich" would take [cache] for markup and drop it
    pretty_exceptions_enable=False,
)
# The commands as the help shows them: panels and commands in the order of their declaration.
STAGE_ONE = "Stage one: the teacher, once"
STAGE_TWO = "Stage two: students"
CACHES = "Look after a cache"
STUDENTS = "Use and judge a student"
INSTALLATION = "This installation"

RecipeFile = Annotated[Path | None, Option("--config", help="TOML: [cache] and [train] tables.")]
Sets = Annotated[list[str] | None, Option("--set", help="section.key=value; repeatable.")]
TeacherName = Annotated[str | None, Option("--teacher", help="A teacher of `tide teachers`.")]
TeachersFile = Annotated[Path | None, Option("--teachers", help="TOML: teachers of your own.")]
Student = Annotated[str, Argument(help="A student: runs/NAME/model, or a hub id.")]
NewTokens = Annotated[int, Option(min=1, help="Tokens of a response, at most.")]
Steps = Annotated[int | None, Option(help="Default: one token a step.")]
Batch = Annotated[int, Option(min=1, help="Prompts at a time.")]
Device = Annotated[str, Option(help="auto, cpu, cuda, …")]
Seed = Annotated[int, Option(help="Of temperature and random remasking.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tide-distill {version('tide-distill')}, Python {sys.version.split()[0]}")
        raise typer.Exit()


@app.callback()
def _options(
    show_version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What stands before the command's name."""


def takes(name: str, group: Callable[..., Any]) -> Callable[[Callable[..., None]], Any]:
    """For a command whose parameter `name` is what `group` makes of options of its own."""
    options = inspect.signature(group, eval_str=True).parameters

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(**values: Any) -> None:
            made = group(**{option: values.pop(option) for option in options})
            command(**values, **{name: made})

        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [p for p in own if p.name != name] + [*options.values()]
        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        wrapped.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapped

    return decorate


def cache_options(
    teacher: TeacherName = None,
    model: Annotated[str | None, Option(help="The teacher's weights: a path or hub id.")] = None,
    student_tokenizer: Annotated[str | None, Option(help="A path or hub id.")] = None,
    data: Annotated[
        str | None, Option(help="A file, a folder or a glob, hf://OWNER/NAME, … (docs/data.md).")
    ] = None,
    prepared: Annotated[Path | None, Option(help="Default: caches/prepared.")] = None,
    config: RecipeFile = None,
    teachers_file: TeachersFile = None,
    sets: Sets = None,
) -> Configure:
    """The settings of stage one, to be completed by what a command changes in them."""
    named = {"student_tokenizer": student_tokenizer, "data": data, "prepared": prepared}
    return functools.partial(
        cache_config, teacher, config, sets or [], teachers_file, model=model, **named
    )


def sampling_options(
    block: Annotated[int | None, Option(help="Default: the block of the training.")] = None,
    threshold: Annotated[float | None, Option(help="Settle all surer than this.")] = None,
    temperature: Annotated[float, Option(help="0: greedy.")] = 0.0,
    top_k: Annotated[int | None, Option(help="Sample from so many of the likeliest.")] = None,
    top_p: Annotated[float, Option(help="Sample from the likeliest of this mass.")] = 1.0,
    remasking: Annotated[str, Option(help="low_confidence or random.")] = "low_confidence",
    guidance: Annotated[float, Option(help="Classifier-free guidance.")] = 0.0,
) -> dict[str, Any]:
    """How a student's tokens are chosen."""
    return dict(locals())


def sampling_settings(**values: Any) -> SampleConfig:
    """Settings of sampling from options. TideError where one is out of range."""
    from student_train.using.settings import SampleConfig

    try:
        return SampleConfig(**{k: v for k, v in values.items() if k != "block" or v is not None})
    except ValueError as error:
        raise TideError(str(error)) from error


def given(**values: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in values.items() if value is not None}


def require_positive(**values: float | None) -> None:
    """TideError for the first option whose number is not finite, or not positive."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            option = name.replace("_", "-")
            raise TideError(f"--{option} is {value:g}", expected="a positive number")
