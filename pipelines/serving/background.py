"""A server beside other work of this process, for tests and measurements."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.serving.run import bind
from pipelines.serving.settings import ServeConfig
from shared.system.errors import TideError
from student_train.using.load import LoadedStudent

_PATIENCE = 30
"""Seconds until it must listen."""


@contextmanager
def served(student: LoadedStudent, config: ServeConfig) -> Iterator[str]:
    """Its address (without `/v1`), until the block ends. TideError where it does not come to listen."""
    from pipelines.serving.server import Server

    with bind(config) as bound:
        listening = threading.Event()
        server = Server(student, config, listening.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            if not listening.wait(_PATIENCE):
                raise TideError(f"the server does not listen after {_PATIENCE} seconds")
            yield f"http://{config.host}:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
