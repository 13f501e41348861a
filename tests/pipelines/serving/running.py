"""A server in this process, and clients of it."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from openai import OpenAI

from pipelines.serving import server
from pipelines.serving.server import ServeConfig
from student_train.using.student import LoadedStudent

_OPEN: list[OpenAI] = []


@contextmanager
def served(student: LoadedStudent, config: ServeConfig) -> Iterator[str]:
    """Its address, until the block ends; its clients are closed after it."""
    with closed_clients(), server.served(student, config) as address:
        yield address


@contextmanager
def closed_clients() -> Iterator[None]:
    """Closes those that `client` made within."""
    try:
        yield
    finally:
        while _OPEN:
            _OPEN.pop().close()


def address_said(process: subprocess.Popen[str], name: str) -> str:
    """Where `tide serve` says on its standard error that it serves the student `name`."""
    assert process.stderr is not None
    for line in process.stderr:
        if said := re.search(rf"serving {re.escape(name)} on (http://127.0.0.1:\d+)/v1", line):
            return said[1]
    raise AssertionError("it ended and served nothing")


def client(address: str, **options: Any) -> OpenAI:
    """Without retries: an error is seen as it comes."""
    usual: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 60}
    _OPEN.append(OpenAI(base_url=f"{address}/v1", **{**usual, **options}))
    return _OPEN[-1]
