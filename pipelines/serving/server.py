"""The web server around the application: it says when it listens, and ends what is under way before it closes."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from starlette.concurrency import run_in_threadpool

from pipelines.serving.engine import Engine
from pipelines.serving.settings import ServeConfig
from pipelines.serving.web import make_app
from student_train.using.load import LoadedStudent

_PATIENCE = 5
"""Seconds that connections get to take their last words."""


class Server(uvicorn.Server):
    """Of one student. `started_to_listen` is called once requests are taken."""

    def __init__(
        self, student: LoadedStudent, config: ServeConfig, started_to_listen: Callable[[], None]
    ) -> None:
        sampling = config.sampling
        self._engine = Engine(
            student, sampling.block, sampling.guidance, config.batch, config.waiting
        )
        self._tell = started_to_listen
        app = make_app(student, config, self._engine)
        super().__init__(
            uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_PATIENCE)
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, and the engine's."""
        self._engine.start()
        await super().startup(sockets)
        self._tell()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """The engine's, which tells all who wait; then uvicorn's."""
        await run_in_threadpool(self._engine.stop)
        await super().shutdown(sockets)
