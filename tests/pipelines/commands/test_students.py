"""`tide sample` and `tide chat`."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.commands.students import talk
from shared.system.errors import TideError
from student_train.using.settings import SampleConfig
from student_train.using.student import LoadedStudent, load_for_use

SHORT = ["--new-tokens", "16", "--block", "8", "--device", "cpu"]


def run(*arguments: str, text: str | None = None) -> str:
    done = CliRunner().invoke(app, list(arguments), input=text, catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def test_prompts_from_arguments_standard_input_and_files_agree(
    student: str, tmp_path: Path
) -> None:
    answers = run("sample", student, "Write `f`.", "And now `g`, which is longer.", *SHORT)
    one = run("sample", student, *SHORT, text="Write `f`.\n")
    assert answers.startswith(one)
    assert run("sample", student, *SHORT, text="\ufeffWrite `f`.\r\n") == one
    asked = [{"role": "user", "content": "And now `g`, which is longer."}]
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
    tide = [sys.executable, "-m", "pipelines.cli"]
    for arguments, given in [(["cache", "--out", b"caches/\xe9"], b""),
                             (["sample", student, *SHORT], b"Write \xff")]:  # fmt: skip
        done = subprocess.run([*tide, *arguments], input=given, capture_output=True, check=False)
        assert done.returncode == 2
        assert b"UTF-8" in done.stderr and b"Traceback" not in done.stderr
    old, cache = {**os.environ, "PYTHONIOENCODING": "latin-1"}, str(caches["tiny-cross"])
    done = subprocess.run([*tide, "inspect", cache], env=old, capture_output=True, check=False)
    assert done.returncode == 0 and b"chunk_student" in done.stdout and b"?" in done.stdout


@pytest.mark.parametrize("show", [True, False])
def test_a_conversation_remembers_and_ends(
    student: str, monkeypatch: pytest.MonkeyPatch, show: bool
) -> None:
    loaded = load_for_use(student, "cpu")
    ids = loaded.prompt([{"role": "user", "content": "x"}])
    assert loaded.tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    seen: list[int] = []
    prompt = LoadedStudent.prompt

    def counted(self: LoadedStudent, messages: list) -> list[int]:
        seen.append(len(messages))
        return prompt(self, messages)

    monkeypatch.setattr(LoadedStudent, "prompt", counted)
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)
    questions = iter(["one", "two", ""])
    monkeypatch.setattr(console, "input", lambda _prompt: next(questions))
    talk(loaded, SampleConfig(new_tokens=16, block=8), show, console)
    assert seen == [1, 3]
    assert ("░" in file.getvalue()) == show
