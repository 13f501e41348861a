"""Help that hides nothing: every command has a panel, and no word of an option's help is taken for markup."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.commands.app import PANELS
from teacher_cache.teachers.registry import all_teachers

ROOT: Any = typer.main.get_command(app)


def shown(*arguments: str, columns: int = 200) -> str:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(columns), "TERM": "dumb"})
    assert done.exit_code == 0, done.output
    return re.sub(r"[│╭╮╰╯─\s]+", " ", done.output)


def test_every_command_stands_in_a_panel_and_in_its_order() -> None:
    assert sorted(name for names in PANELS.values() for name in names) == sorted(ROOT.commands)
    text = shown("--help")
    assert [panel for panel in PANELS if panel in text] == list(PANELS)
    for panel, names in PANELS.items():
        assert {
            command.rich_help_panel for name, command in ROOT.commands.items() if name in names
        } == {panel}


@pytest.mark.parametrize("name", [name for name in ROOT.commands if name != "lm-eval"])
def test_no_word_of_the_help_is_lost(name: str) -> None:
    text = shown(name, "--help")
    for parameter in ROOT.commands[name].params:
        for word in (parameter.help or "").replace("`", "").split():
            assert word in text, f"{parameter.name}: {word}"


def test_the_tables_of_a_recipe_are_named() -> None:
    assert "[cache] and [train] tables" in shown("cache", "--help")
    assert "hf://OWNER/NAME[:CONFIG][:SPLIT]" in shown("cache", "--help")


def test_version_and_completion() -> None:
    assert shown("--version").startswith(
        f"tide-distill {version('tide-distill')}, Python {sys.version.split()[0]}"
    )
    assert "--install-completion" in shown("--help")


@pytest.mark.parametrize("columns", [20, 80])
def test_teachers_are_never_shortened(columns: int) -> None:
    text = shown("teachers", columns=columns)
    for name, entry in all_teachers().items():
        assert f" {name} " in text and f" {entry.model} " in text
    assert "…" not in text


def test_a_name_in_brackets_is_no_markup(tmp_path: Any) -> None:
    entry = 'model = "models/[bold]x"\narchitecture = "llama"\nmask_id = 5\nstudent_tokens = true\n'
    (tmp_path / "t.toml").write_text(f'["mine[1]"]\n{entry}length = 64\nstudent = "s"\n')
    text = shown("teachers", "--teachers", str(tmp_path / "t.toml"))
    assert "mine[1]" in text and "models/[bold]x" in text


def test_one_line_a_teacher_when_piped() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "teachers"],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line for line in done.stdout.splitlines() if "inclusionAI/LLaDA2.0-mini" in line]
    assert [row.split()[1] for row in rows] == ["llada2-mini", "llada2-mini-blocks"]
