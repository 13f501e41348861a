"""The Typer application, the panels of its help, and the options that several commands share."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from typer.models import CommandInfo

PANELS = {
    "Stage one: the teacher, once": (
        "teachers",
        "recipes",
        "prepare",
        "plan",
        "throughput",
        "fidelity",
        "cache",
    ),
    "Stage two: students": ("train", "ablate", "replay", "report", "compare"),
    "Look after a cache": (
        "inspect",
        "verify",
        "prune",
        "merge",
        "pack",
        "unpack",
        "push",
        "pull",
    ),
    "Use and judge a student": ("sample", "chat", "serve", "eval", "lm-eval", "export", "publish"),
    "This installation": ("env", "demo", "bench", "tiny-teacher", "tiny-student"),
}
"""The commands as the help shows them."""

app = typer.Typer(
    name="tide",
    help="Distil diffusion language models: cache a teacher once, train many students from the cache.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # "rich" would take [cache] for markup and drop it
    pretty_exceptions_enable=False,
)

Recipe = Annotated[
    Path | None, typer.Option("--config", help="A TOML recipe with [cache] and [train] tables.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a setting: section.key=value. Repeatable."),
]
TeacherName = Annotated[str | None, typer.Option("--teacher", help="A teacher of `tide teachers`.")]
TeachersFile = Annotated[
    Path | None, typer.Option("--teachers", help="A TOML file with teachers of your own.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tide-distill {version('tide-distill')}, Python {sys.version.split()[0]}")
        raise typer.Exit()


@app.callback()
def _options(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """What stands before the command's name."""


def arrange_help() -> None:
    """Give every command its panel, once all are registered; KeyError where `PANELS` has none for it."""
    place = {
        name: (panel, i)
        for i, (panel, name) in enumerate((p, n) for p, names in PANELS.items() for n in names)
    }

    def name_of(command: CommandInfo) -> str:
        assert command.callback is not None
        return command.name or command.callback.__name__.replace("_", "-")

    for command in app.registered_commands:
        command.rich_help_panel = place[name_of(command)][0]
    for group in app.registered_groups:
        group.rich_help_panel = place[str(group.name)][0]
    app.registered_commands.sort(key=lambda command: place[name_of(command)][1])
