"""The Typer application, the panels of its help, and the options that several commands share."""

import functools
import inspect
import math
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from pipelines.recipes.read import cache_config
from shared.settings.config import CacheConfig
from shared.system.errors import TideError

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
Folder = Annotated[Path, Argument(help="A new folder.")]


@app.callback(invoke_without_command=True)
def _before_the_command(
    show_version: Annotated[bool, Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        typer.echo(f"tide-distill {version('tide-distill')}, Python {sys.version.split()[0]}")
        raise typer.Exit()


def takes(name: str, group: Callable[..., Any]) -> Callable[[Callable[..., None]], Any]:
    """Decorate a command whose parameter `name` is what `group` makes of options of its own."""
    options = inspect.signature(group, eval_str=True).parameters

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(**values: Any) -> None:
            made = group(**{option: values.pop(option) for option in options})
            command(**values, **{name: made})

        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [p for p in own if p.name != name] + [*options.values()]
        keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        wrapped.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapped

    return decorate


def cache_options(
    teacher: TeacherName = None,
    model: Annotated[str | None, Option(help="The teacher's weights: a path or hub id.")] = None,
    student_tokenizer: Annotated[str | None, Option(help="A path or hub id.")] = None,
    data: Annotated[str | None, Option(help="A file, hf://OWNER/NAME, … (docs/data.md).")] = None,
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


def given(**values: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in values.items() if value is not None}


def require_positive(**values: float | None) -> None:
    """TideError for the first option whose number is not finite, or not positive."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            option = name.replace("_", "-")
            raise TideError(f"--{option} is {value:g}", expected="a positive number")
