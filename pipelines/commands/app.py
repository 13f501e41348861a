"""The Typer application, the panels of its help, and the options that several commands share."""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from shared.system.errors import TideError

if TYPE_CHECKING:
    from student_train.using.settings import SampleConfig

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

RecipeFile = Annotated[
    Path | None, Option("--config", help="A TOML recipe with [cache] and [train] tables.")
]
Sets = Annotated[
    list[str] | None, Option("--set", help="Override a setting: section.key=value. Repeatable.")
]
TeacherName = Annotated[str | None, Option("--teacher", help="A teacher of `tide teachers`.")]
TeachersFile = Annotated[
    Path | None, Option("--teachers", help="A TOML file with teachers of your own.")
]
Weights = Annotated[str | None, Option("--model", help="Path or hub id of the teacher's weights.")]
Shape = Annotated[
    str | None, Option("--model", help="A folder with a config.json (default: sizes on record).")
]
StudentTokenizer = Annotated[str | None, Option(help="Path or hub id of the student's tokenizer.")]
DataSource = Annotated[
    str | None,
    Option(
        "--data",
        help="A file, a folder or a glob, hf://OWNER/NAME[:CONFIG][:SPLIT], or stdlib:train "
        "(docs/data.md).",
    ),
]
PreparedFolder = Annotated[
    Path | None, Option("--prepared", help="Where prepared data lies (default: caches/prepared).")
]
Student = Annotated[str, Argument(help="A student: runs/NAME/model, or a hub id.")]
NewTokens = Annotated[int, Option(min=1, help="Tokens of a response, at most.")]
Steps = Annotated[int | None, Option("--steps-per-block", help="Default: one token a step.")]
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


def _sampling(
    block: Annotated[int | None, Option(help="Default: the block of the training.")] = None,
    threshold: Annotated[
        float | None, Option(help="Settle all positions above this probability.")
    ] = None,
    temperature: Annotated[float, Option(help="0: greedy.")] = 0.0,
    top_k: Annotated[int | None, Option(help="Sample from so many of the likeliest.")] = None,
    top_p: Annotated[
        float, Option(help="Sample from the likeliest that have this probability together.")
    ] = 1.0,
    remasking: Annotated[
        Literal["low_confidence", "random"], Option(help="Which tokens wait longest.")
    ] = "low_confidence",
    guidance: Annotated[float, Option(help="Classifier-free guidance.")] = 0.0,
) -> None:
    """How a student's tokens are chosen."""


def takes_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `sampling` (a dict) is filled by the options of `_sampling`."""
    own = dict(inspect.signature(command, eval_str=True).parameters)
    del own["sampling"]
    group = inspect.signature(_sampling, eval_str=True).parameters

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        sampling = {name: values.pop(name) for name in group}
        command(**values, sampling=sampling)

    parameters = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in (*own.values(), *group.values())
    ]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def sampling_settings(**values: Any) -> SampleConfig:
    """Settings of sampling from options; without a block, its default. TideError as ValueError."""
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
