"""The command: the whole way through it, what it answers where it refuses, help that hides
nothing, text of others on the terminal, which is shown and never obeyed, and a student's answers.
"""

import io
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from pipelines.cli import INSTALLATION, app, main
from pipelines.commands.app import json_line, printable
from pipelines.commands.caches import CACHES
from pipelines.commands.stages import STAGE_ONE, STAGE_TWO
from pipelines.commands.students import STUDENTS, talk
from shared.system.files import TideError
from shared.text.tokenizers import Tokenizer
from student_train.using.settings import SampleConfig
from student_train.using.student import load_for_use
from teacher_cache.teachers.registry import all_teachers
from tests.conftest import chats_file, heldout_file

SMALL = ("shard_examples=8", "lengths.student=128", "lengths.teacher=128", "data.limit=24",
         "engine.device=cpu")  # fmt: skip
TRAIN = ("max_steps=2", "batch_size=4", "checkpoint_steps=2", "log_steps=1", "device=cpu",
         "student.layers=1", f"heldout.source={heldout_file()}", "heldout.limit=2")  # fmt: skip


def tide(*arguments: str, columns: int = 200) -> str:
    """What the command prints, less its frames."""
    env = {"COLUMNS": str(columns), "TERM": "dumb"}
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False, env=env)
    assert done.exit_code == 0, done.output
    return re.sub(r"[│╭╮╰╯─\s]+", " ", done.stdout)


def test_cache_then_train_then_report(random_teacher: Path, tmp_path: Path) -> None:
    cache = ["cache", "--model", str(random_teacher), "--data", str(chats_file())]
    cache += ["--out", str(tmp_path / "c"), *(word for one in SMALL for word in ("--set", one))]
    planned = tide(*cache, "--dry-run")
    assert "measured on the first 24 examples under 3 draws" in planned
    assert not (tmp_path / "c" / "manifest.json").exists()
    assert "3 shards computed, 0 kept" in tide(*cache, "--draws", "1")
    assert "3 shards computed, 3 kept" in tide(*cache, "--draws", "2")
    how = ["--cache", str(tmp_path / "c"), "--seed", "1"]
    how += [word for one in TRAIN for word in ("--set", one)]
    found = tide("gradients", *how, "--rows", "8", "--temperature", "3", "--weight", "7")
    assert "reverse_calm, T 3" in found and "weight 7" in found
    assert "eval_heldout_nll" in tide("train", *how, "--out", str(tmp_path / "r"))
    assert "reverse_calm, T 5.0" in tide("report", str(tmp_path))
    assert (tmp_path / "report.png").stat().st_size > 10_000


REFUSED = [
    ("cache --teacher llada", "llada"),  # one a kind: a teacher that is not known, by a flag,
    ("cache --config recipe.toml --teacher llada", "llada"),  # beside a recipe,
    ("train --teacher mine", "mine"),  # in stage two,
    ("teachers show none", "none"),  # or to be shown
    ("recipes show none", "none"),
    ("cache --config wrong.toml", "learning_rate"),  # a misspelt setting of the other stage
    ("cache --set engine.device=cuda:7", "cuda:7"),  # hardware that is not there
    ("cache --set data.source=/nowhere.jsonl", "/nowhere.jsonl"),  # places that are not there
    ("cache --out /proc/x", "/proc/x"),  # or are not to be written
    ("plan --teacher llada-8b --response nan", "--response"),  # a number that cannot be
    ("plan --no-such-option", "--no-such-option"),  # Typer's own
    ("train --use_peft", "student.lora"),  # or another trainer's
    ("cache --data-parallel 4", "CUDA_VISIBLE_DEVICES=0,1"),  # copies beyond the visible GPUs
    ("report /nowhere\x1b]0;evil\x07", "/nowhere"),  # text that would obey itself
]


@pytest.mark.parametrize(("command", "name"), REFUSED, ids=[c.split("\x1b")[0] for c, _ in REFUSED])
def test_what_cannot_be_is_one_message_and_exit_code_two(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text('[cache]\nteacher = "tiny-cross"\n')
    (tmp_path / "wrong.toml").write_text("[train]\nlearning_rte = 1e-4\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(sys, "argv", ["tide", *command.split()])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(SystemExit) as stop:
        main()
    said = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert stop.value.code == 2 and name in said
    assert "Traceback" not in said and "\x1b" not in said and "\x07" not in said
    assert sum(line.startswith("tide: error") for line in said.splitlines()) <= 1


QUICK = """
import contextlib, io, sys
from pipelines.cli import main
for words in ("cache --teacher llada8b", "cache --set noise.drws=3", "train --set epochz=3",
              "teachers", "teachers show wedlm", "recipes", "recipes show cross", "--help"):
    sys.argv = ["tide", *words.split()]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit:
            pass
print([name for name in ("torch", "transformers", "sklearn", "pandas") if name in sys.modules])
"""


def test_what_needs_no_model_imports_no_model_library() -> None:
    done = subprocess.run([sys.executable, "-c", QUICK], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_help_has_every_command_in_its_panel_and_no_word_is_lost() -> None:
    root: Any = typer.main.get_command(app)
    text = tide("--help")
    panels = [STAGE_ONE, STAGE_TWO, CACHES, STUDENTS, INSTALLATION]
    places = [text.index(panel) for panel in panels]
    assert places == sorted(places) and "--install-completion" in text
    for name, command in root.commands.items():
        assert f" {name} " in text and command.rich_help_panel in panels
        if name == "lm-eval":
            continue
        own = tide(name, "--help")
        for parameter in command.params:
            for word in (parameter.help or "").replace("`", "").split():
                assert word in own, f"{name} {parameter.name}: {word}"
    expected = f"tide-distill {version('tide-distill')}, Python {sys.version.split()[0]}"
    assert tide("--version").startswith(expected)


def test_teachers_are_never_shortened_and_a_name_in_brackets_is_no_markup(tmp_path: Path) -> None:
    entry = 'model = "models/[bold]x"\narchitecture = "llama"\nmask_id = 5\nstudent_tokens = true\n'
    (tmp_path / "t.toml").write_text(f'["mine[1]"]\n{entry}length = 64\nstudent = "s"\n')
    text = tide("teachers", "--teachers", str(tmp_path / "t.toml"), columns=20)
    for name, teacher in all_teachers(tmp_path / "t.toml").items():
        assert f" {name} " in text and f" {teacher.model} " in text
    assert "…" not in text and "models/[bold]x" in text


SEQUENCES = [
    "\x1b]0;evil\x07", "\x1b]2;evil\x1b\\", "\x9d0;evil\x9c",  # a title, also in one byte
    "\x1b]52;c;ZXZpbA==\x07", "\x1b]8;;http://evil\x1b\\",  # the clipboard, a link
    "\x1b[2J", "\x9b2J", "\x1b[31m", "\x1bc", "\x1b(0",  # clear, colour, reset, characters
    "\x1bPevil\x1b\\", "\x1b_evil\x1b\\", "\x1b]0;evil", "\x1b[31",  # device; unfinished
    "\x07", "\x08\x08", "\r", "\x7f", "\x1b", "\u202e", "\u2066",  # alone; another direction
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


SHORT = ["--new-tokens", "16", "--block", "8", "--device", "cpu"]


def run(*arguments: str, text: str | None = None) -> str:
    done = CliRunner().invoke(app, list(arguments), input=text, catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_prompts_from_arguments_input_and_files_agree(student: str, tmp_path: Path) -> None:
    longer = "And now `g`, which is longer."
    answers = run("sample", student, "Write `f`.", longer, *SHORT)
    assert answers.startswith(run("sample", student, *SHORT, text="\ufeffWrite `f`.\r\n"))
    asked = [{"role": "user", "content": longer}]
    answered = [*asked, {"role": "assistant", "content": "def g(): ..."}]  # no part of the prompt
    rows = [{"prompt": "Write `f`."}, {"messages": asked}, {"messages": answered}]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    lines = run("sample", student, "--file", str(file), *SHORT).splitlines()
    assert lines[1] == lines[2] and json.loads(lines[2])["messages"] == asked
    assert answers == "".join(json.loads(line)["response"] + "\n" for line in lines[:2])
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    for arguments in (["--file", str(file)], ["x", "--threshold", "2"], ["x", "--device", "gpu"]):
        with pytest.raises(TideError):
            run("sample", student, *arguments)


def test_bytes_that_are_no_text_are_explained(student: str, caches: dict[str, Path]) -> None:
    """In arguments and on standard input; a terminal that lacks a character prints another."""
    program, out = [sys.executable, "-m", "pipelines.cli"], ["cache", "--out", b"caches/\xe9"]
    for words, text in ((out, b""), (["sample", student, *SHORT], b"Write \xff")):
        done = subprocess.run([*program, *words], input=text, capture_output=True, check=False)
        assert done.returncode == 2
        assert b"UTF-8" in done.stderr and b"Traceback" not in done.stderr
    old, cache = {**os.environ, "PYTHONIOENCODING": "latin-1"}, str(caches["tiny-cross"])
    done = subprocess.run([*program, "inspect", cache], env=old, capture_output=True, check=False)
    assert done.returncode == 0 and b"chunk_student" in done.stdout and b"?" in done.stdout


def test_a_conversation_remembers_and_ends(student: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_for_use(student, "cpu")
    ids = loaded.tokenizer.encode_prompt([{"role": "user", "content": "x"}])
    assert loaded.tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    seen: list[int] = []
    counted = "encode_prompt", lambda _self, messages: seen.append(len(messages)) or ids
    monkeypatch.setattr(Tokenizer, *counted)
    for show in (True, False):
        file, questions = io.StringIO(), iter(["one", "two", ""])
        console = Console(file=file, force_terminal=True, width=80)
        monkeypatch.setattr(console, "input", lambda _prompt, own=questions: next(own))
        talk(loaded, SampleConfig(new_tokens=16, block=8), show, console)
        assert ("░" in file.getvalue()) == show
    assert seen == [1, 3, 1, 3]
