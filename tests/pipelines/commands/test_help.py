"""Help that hides nothing: commands by panel, and no word of an option's help taken for markup."""

import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from pipelines.cli import INSTALLATION, app
from pipelines.commands.caches import CACHES
from pipelines.commands.stages import STAGE_ONE, STAGE_TWO
from pipelines.commands.students import STUDENTS
from teacher_cache.teachers.registry import all_teachers

ROOT: Any = typer.main.get_command(app)


def shown(*arguments: str, columns: int = 200) -> str:
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(columns), "TERM": "dumb"})
    assert done.exit_code == 0, done.output
    return re.sub(r"[│╭╮╰╯─\s]+", " ", done.output)


def test_the_help_has_every_command_in_its_panel_and_no_word_is_lost() -> None:
    text = shown("--help")
    panels = [STAGE_ONE, STAGE_TWO, CACHES, STUDENTS, INSTALLATION]
    places = [text.index(panel) for panel in panels]
    assert places == sorted(places) and "--install-completion" in text
    for name, command in ROOT.commands.items():
        assert f" {name} " in text and command.rich_help_panel in panels
        if name == "lm-eval":
            continue
        own = shown(name, "--help")
        for parameter in command.params:
            for word in (parameter.help or "").replace("`", "").split():
                assert word in own, f"{name} {parameter.name}: {word}"
    expected = f"tide-distill {version('tide-distill')}, Python {sys.version.split()[0]}"
    assert shown("--version").startswith(expected)


def test_teachers_are_never_shortened_and_a_name_in_brackets_is_no_markup(tmp_path: Path) -> None:
    entry = 'model = "models/[bold]x"\narchitecture = "llama"\nmask_id = 5\nstudent_tokens = true\n'
    (tmp_path / "t.toml").write_text(f'["mine[1]"]\n{entry}length = 64\nstudent = "s"\n')
    text = shown("teachers", "--teachers", str(tmp_path / "t.toml"), columns=20)
    for name, teacher in all_teachers(tmp_path / "t.toml").items():
        assert f" {name} " in text and f" {teacher.model} " in text
    assert "…" not in text and "models/[bold]x" in text
