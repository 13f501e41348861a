"""What a person sees in a terminal: text of others is shown, never obeyed; tables are never cut."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table

_CONTROL = re.compile(
    r"(?:\x1b\]|\x9d)[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC: titles, links, the clipboard
    r"|(?:\x1b[PX^_]|[\x90\x98\x9e\x9f])[^\x1b\x9c]*(?:\x1b\\|\x9c)?"  # DCS, SOS, PM, APC
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # CSI: colours, cursor, clearing
    r"|\x1b[ -/]*[0-~]?"  # the short ones
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # control characters but tab and line break
    r"|[\u202a-\u202e\u2066-\u2069]"  # turns the direction of writing: shows what is not there
)


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
