"""Run the server until it is told to stop."""

from __future__ import annotations

import importlib.util
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

from pipelines.serving.settings import ServeConfig
from shared.system.errors import TideError
from student_train.using.load import LoadedStudent


def check_installed() -> None:
    """TideError where the server's libraries are missing."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise TideError(
            f"{' and '.join(missing)} must be installed to serve", fix='pip install ".[serve]"'
        )


def served_name(place: str) -> str:
    """What a student is called: its hub id, its run, or its folder."""
    path = Path(place)
    if not path.exists():
        return place
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def bind(config: ServeConfig) -> socket.socket:
    """The socket, taken before a model is loaded. TideError where the address cannot be had."""
    with ExitStack() as closed_again:
        try:
            family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
            bound = closed_again.enter_context(socket.socket(family))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((config.host, config.port))
        except (OSError, UnicodeError) as error:
            raise TideError(
                f"{config.host}:{config.port} cannot be served on: {error}",
                fix="choose another --port (0 takes one that is free) or --host",
            ) from error
        closed_again.pop_all()
    return bound


def serve(student: LoadedStudent, config: ServeConfig, bound: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM; responses under way then end with an error."""
    from pipelines.serving.server import Server

    host, port = bound.getsockname()[:2]
    place = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    if not config.local and config.api_key is None:
        _say("whoever reaches this machine can ask: set TIDE_API_KEY to require a key")
    server = Server(student, config, lambda: _say(f"serving {config.name} on {place}"))
    try:
        server.run(sockets=[bound])  # raises the signal again that ended it
    except KeyboardInterrupt:
        _say("\nserved until here")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
