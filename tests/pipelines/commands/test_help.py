"""Help that hides nothing, and text of others on the terminal, which is shown and never obeyed."""

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from pipelines.cli import INSTALLATION, app
from pipelines.commands.app import json_line, printable
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


SEQUENCES = [
    "\x1b]0;evil\x07", "\x1b]2;evil\x1b\\",  # a title
    "\x1b]52;c;ZXZpbA==\x07", "\x1b]8;;http://evil\x1b\\",  # the clipboard, a link
    "\x1b[2J", "\x1b[31m", "\x1bc",  # clear, colour, reset
    "\x9b2J", "\x9d0;evil\x9c",  # CSI and OSC in one byte
    "\x1bPevil\x1b\\", "\x1b_evil\x1b\\", "\x1b(0",  # device, application, character set
    "\x07", "\x08\x08", "\r", "\x7f", "\x1b",  # bell, backspaces, return, delete, alone
    "\x1b]0;evil", "\x1b[31",  # unfinished
    "\u202e", "\u2066",  # another direction
]  # fmt: skip


def test_sequences_are_not_printed_and_ordinary_text_is() -> None:
    for sequence in SEQUENCES:
        assert printable(f"a{sequence}") == "a", repr(sequence)
    text = "naïve 中文 العربية 👩‍💻\n\tx = [1; 2] ]0; \\e[31m ✓\u200f"
    assert printable(text) == text


@given(st.text(alphabet=st.characters(max_codepoint=0x2FFF)))
def test_nothing_that_controls_is_left(text: str) -> None:
    left = printable(text)
    assert not any((c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f" for c in left)
    assert printable(left) == left


@given(st.text())
def test_json_says_the_same_without_them(text: str) -> None:
    line = json_line(json.dumps({"x": text}, ensure_ascii=False))
    assert json.loads(line) == {"x": text}
    assert printable(line) == line
