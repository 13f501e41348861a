"""`tide serve` as a program: it says where, answers, and ends at a signal whatever is under way."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.serving.server import served_name
from shared.system.errors import TideError
from tests.pipelines.serving.running import client, closed_clients


@contextmanager
def program(student: str, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """It and its address."""
    tide = [sys.executable, "-m", "pipelines.cli", "serve"]
    command = [*tide, student, "--port", "0", "--device", "cpu", *options]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "TIDE_API_KEY": "k"}
    )
    assert process.stderr is not None
    with process, closed_clients():
        try:
            found = None
            while found is None:
                line = process.stderr.readline()
                assert line, process.wait()
                found = re.search(r"serving run on (http://127.0.0.1:\d+)/v1", line)
            yield process, found[1]
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_answers_and_ends_at_a_signal(student: str, number: signal.Signals) -> None:
    with program(student, "--block", "8", "--new-tokens", "16") as (process, address):
        asked = client(address, api_key="k")
        (model,) = asked.models.list()
        got = asked.chat.completions.create(
            model=model.id, messages=[{"role": "user", "content": "Write `f`."}]
        )
        assert got.usage is not None and got.usage.completion_tokens <= 16
        stream = asked.completions.create(model="run", prompt="x", max_tokens=3000, stream=True)
        taken = iter(stream)
        next(taken)
        begin = time.monotonic()
        process.send_signal(number)
        with pytest.raises(openai.APIError):
            list(taken)
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(timeout=30) == 0
        assert time.monotonic() - begin < 20
        assert "Traceback" not in said and "served until here" in said


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
