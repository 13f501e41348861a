"""The Typer application: how a command is declared, and what a person sees in a terminal.

Text of others is shown, never obeyed; tables are never cut.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from shared.settings.build import OTHERS, advice
from shared.system.files import TideError

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(
    name="tide",
    help="Distil diffusion language models: cache a teacher once, train many students from it.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # "rich" would take [cache] for markup and drop it
    pretty_exceptions_enable=False,
)
_CONTROL = re.compile(
    r"(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC: titles, links, the clipboard
    r"|(?:\x1b[PX^_]|[\x90\x98\x9e\x9f])[^\x1b\x9c]*(?:\x1b\\|\x9c)?"  # DCS, SOS, PM, APC
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # CSI: colours, cursor, clearing
    r"|\x1b[ -/]*[0-~]?"  # the short ones
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # control characters but tab and line break
    r"|[\u202a-\u202e\u2066-\u2069]"  # turns the direction of writing: shows what is not there
)


@app.callback(invoke_without_command=True)
def before_the_command(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        typer.echo(f"tide-distill {version('tide-distill')}, Python {sys.version.split()[0]}")
        raise typer.Exit()


class _Command(typer.core.TyperCommand):
    """Says of an option that there is not where settings are stated that are no option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            unknown: Any = error
            if type(error).__name__ == "NoSuchOption" and "sets" in [p.name for p in self.params]:
                name = unknown.option_name.lstrip("-").replace("-", "_")
                known = f" ({advice(name, [])})" if name in OTHERS else ""
                unknown.message += f"{known}; settings are given as --set learning_rate=1e-4"
            raise


def command(panel: str, name: str | None = None, **groups: Callable[..., Any]) -> Any:
    """Declare a command in a panel of the help. A parameter named in `groups` is what that function
    makes of its own options, which are options of the command.
    """

    def declare(run: Callable[..., None]) -> Callable[..., None]:
        options = {group: inspect.signature(groups[group], eval_str=True) for group in groups}

        @functools.wraps(run)
        def wrapped(**values: Any) -> None:
            for group, make in groups.items():
                values[group] = make(**{o: values.pop(o) for o in options[group].parameters})
            run(**values)

        own = inspect.signature(run, eval_str=True).parameters.values()
        parameters = [parameter for parameter in own if parameter.name not in groups]
        for signature in options.values():
            parameters += signature.parameters.values()
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        wrapped.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
        return app.command(name, cls=_Command, rich_help_panel=panel)(wrapped)

    return declare


def require_positive(**values: float | None) -> None:
    """TideError for the first option whose number is not finite, or not positive."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            option = name.replace("_", "-")
            raise TideError(f"--{option} is {value:g}", expected="a positive number")


def printable(text: str) -> str:
    """`text` without control sequences; of control characters only line breaks and tabs stay."""
    return _CONTROL.sub("", text)


def say(text: str) -> None:
    """Print `text` and a line break, without control sequences."""
    typer.echo(printable(text))


def json_line(text: str) -> str:
    """JSON that holds the same, with the control characters escaped that JSON would leave."""
    escaped = "[\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
    return re.sub(escaped, lambda match: f"\\u{ord(match[0]):04x}", text)


def print_table(table: Table) -> None:
    """Print `table` as wide as its widest rows, also where that is wider than the terminal."""
    from rich.console import Console

    console = Console()
    unbounded = console.options.update(width=100_000)
    console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.print(table, crop=False, soft_wrap=True)
