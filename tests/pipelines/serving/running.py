"""A server in this process, and clients of it."""

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


def client(address: str, **options: Any) -> OpenAI:
    """Without retries: an error is seen as it comes."""
    usual: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 60}
    _OPEN.append(OpenAI(base_url=f"{address}/v1", **{**usual, **options}))
    return _OPEN[-1]
