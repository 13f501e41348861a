"""The Typer application and the options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="tide",
    help="Distil diffusion language models: cache a teacher once, train many students from the cache.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Recipe = Annotated[Path | None, typer.Option("--config", help="A TOML recipe with [cache] and [train] tables.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: section.key=value. Repeatable.")]
TeacherName = Annotated[str | None, typer.Option("--teacher", help="A teacher of `tide teachers`.")]
TeachersFile = Annotated[Path | None, typer.Option("--teachers", help="A TOML file with teachers of your own.")]
