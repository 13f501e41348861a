from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.commands import chat
from shared.system.errors import TideError
from student_train.using.load import LoadedStudent, load_for_use
from student_train.using.settings import SampleConfig

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
    rows = [
        {"prompt": "Write `f`."},
        {"messages": [{"role": "user", "content": "And now `g`, which is longer."}]},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    lines = run("sample", student, "--file", str(tmp_path / "p.jsonl"), *SHORT).splitlines()
    found = [json.loads(line)["response"] for line in lines]
    assert answers == "".join(answer + "\n" for answer in found)


def test_bytes_that_are_no_text_are_explained(student: str, caches: dict[str, Path]) -> None:
    """In arguments and on standard input; what is printed meets a terminal that lacks its characters."""
    tide = [sys.executable, "-m", "pipelines.cli"]
    for arguments, given, words in [
        (["sample", student, b"\xff f", *SHORT], b"", "the argument b'\\xff f' is not UTF-8"),
        (["cache", "--out", b"caches/\xe9"], b"", "the argument b'caches/\\xe9' is not UTF-8"),
        (
            ["sample", student, *SHORT],
            b"Write \xff",
            "standard input is not UTF-8: 'utf-8' codec can't decode",
        ),
    ]:
        done = subprocess.run([*tide, *arguments], input=given, capture_output=True, check=False)
        assert done.returncode == 2
        assert words in done.stderr.decode() and "Traceback" not in done.stderr.decode()
    old, cache = {**os.environ, "PYTHONIOENCODING": "latin-1"}, str(caches["tiny-cross"])
    done = subprocess.run([*tide, "inspect", cache], env=old, capture_output=True, check=False)
    assert done.returncode == 0 and b"chunk_student" in done.stdout and b"?" in done.stdout, (
        done.stderr
    )


def test_the_answer_in_a_row_of_data_is_not_fed_as_the_prompt(student: str, tmp_path: Path) -> None:
    asked: list[dict[str, str]] = [{"role": "user", "content": "Write `f`."}]
    answered = [*asked, {"role": "assistant", "content": "def f(): ..."}]
    rows = [{"messages": asked}, {"messages": answered}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    lines = run("sample", student, "--file", str(tmp_path / "p.jsonl"), *SHORT).splitlines()
    assert lines[0] == lines[1] and json.loads(lines[1])["messages"] == asked
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": answered[1:]}) + "\n")
    with pytest.raises(TideError, match=r"p\.jsonl:1 is no prompt"):
        CliRunner().invoke(
            app, ["sample", student, "--file", str(tmp_path / "p.jsonl")], catch_exceptions=False
        )


def test_bad_input_is_explained(student: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    for arguments, message in [
        (["--file", str(tmp_path / "p.jsonl")], "p.jsonl:2 is no prompt"),
        (["--file", str(tmp_path / "none.jsonl")], "there is no file"),
        (["x", "--remasking", "best"], "low_confidence or random"),
        (["x", "--new-tokens", "0"], "both must be positive"),
        (["x", "--device", "gpu"], "device is 'gpu'"),
        (
            ["x", "--device", "mps" if torch.cuda.is_available() else "cuda"],
            "is not on this machine",
        ),
    ]:
        with pytest.raises(TideError, match=message):
            CliRunner().invoke(app, ["sample", student, *arguments], catch_exceptions=False)


def test_the_prompt_is_the_one_of_training(student: str) -> None:
    loaded = load_for_use(student, "cpu")
    ids = loaded.prompt([{"role": "user", "content": "x"}])
    assert loaded.tokenizer.decode(ids).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("show", [True, False])
def test_a_conversation_remembers_and_ends(
    student: str, monkeypatch: pytest.MonkeyPatch, show: bool
) -> None:
    loaded = load_for_use(student, "cpu")
    seen: list[int] = []
    prompt = LoadedStudent.prompt
    monkeypatch.setattr(
        LoadedStudent,
        "prompt",
        lambda self, messages: seen.append(len(messages)) or prompt(self, messages),
    )
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    questions = iter(["one", "two", ""])
    monkeypatch.setattr(console, "input", lambda _prompt: next(questions))
    chat.talk(loaded, SampleConfig(new_tokens=16, block=8), show, console)
    assert seen == [1, 3]
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("░" in drawn) == show
