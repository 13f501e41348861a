"""Tables that are never shortened: what people grep for stands there whole, however wide the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def print_table(table: Table) -> None:
    """Print `table` as wide as its widest rows, also where that is wider than the terminal, or piped."""
    console = Console()
    unbounded = console.options.update(width=100_000)
    console.width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.print(table, crop=False, soft_wrap=True)
