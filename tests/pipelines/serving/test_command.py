"""`tide serve` as a program: it says where, answers, and ends at a signal whatever is under way."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.serving.server import served_name
from shared.system.errors import TideError
from tests.pipelines.serving.running import address_said, client, closed_clients


def test_it_answers_and_ends_at_a_signal(student: str) -> None:
    tide = [sys.executable, "-m", "pipelines.cli", "serve", student, "--port=0", "--device=cpu"]
    command = [*tide, "--block=8", "--new-tokens=16"]
    environment = {**os.environ, "TIDE_API_KEY": "k"}
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process,
        closed_clients(),
    ):
        assert process.stderr is not None
        asked = client(address_said(process, "run"), api_key="k")
        chat: Any = [{"role": "user", "content": "Write `f`."}]
        got = asked.chat.completions.create(model="run", messages=chat)
        assert got.usage is not None and got.usage.completion_tokens <= 16
        more: Any = {"model": "run", "prompt": "x", "max_tokens": 3000, "stream": True}
        taken = iter(asked.completions.create(**more))
        next(taken)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError):
            list(taken)
        said = process.stderr.read()
        assert process.wait(timeout=30) == 0
        assert "Traceback" not in said


def test_the_name_of_a_student(tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    assert served_name(str(tmp_path / "mine" / "model")) == "mine"
    assert served_name(str(tmp_path / "mine")) == "mine"
    assert served_name("owner/name") == "owner/name"


def test_a_port_that_is_taken(student: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(TideError):
            CliRunner().invoke(app, ["serve", student, "--port", port], catch_exceptions=False)
