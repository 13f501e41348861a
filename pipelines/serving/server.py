"""How a student is served, and what the command runs."""

import importlib.util
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from shared.system.errors import TideError
from student_train.using.settings import SampleConfig
from student_train.using.student import LoadedStudent

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeConfig:
    """Limits of the server, and how it samples where a request does not say. TideError where one
    cannot be.
    """

    name: str  # of the model, as requests must say it
    sampling: SampleConfig = field(default_factory=SampleConfig)
    batch: int = 16  # responses under way at once
    waiting: int = 256  # responses that may wait for a place; beyond, requests get status 503
    body_bytes: int = 4 << 20  # of a request
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    api_key: str | None = field(default=None, repr=False)  # the bearer token of requests

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("waiting", 0), ("body_bytes", 1), ("port", 0)):
            if getattr(self, name) < least:
                raise TideError(f"{name} is {getattr(self, name)}", expected=f"at least {least}")
        if self.api_key is not None and not self.api_key.strip():
            fix = "give one, or leave the option and TIDE_API_KEY out"
            raise TideError("the API key is empty", fix=fix)
        if not self.name:
            raise TideError("the model's name is empty", fix="give one (--name)")

    @property
    def local(self) -> bool:
        """Whether only this machine can ask."""
        return self.host in ("127.0.0.1", "localhost", "::1")


def check_installed() -> None:
    """TideError where the server's libraries are missing."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        fix = 'pip install ".[serve]"'
        raise TideError(f"{' and '.join(missing)} must be installed to serve", fix=fix)


def served_name(place: str) -> str:
    """What a student is called: its hub id, its run, or its folder."""
    path = Path(place)
    if not path.exists():
        return place
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def bind(config: ServeConfig) -> socket.socket:
    """The socket, taken before a model is loaded. TideError where the address cannot be had."""
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((config.host, config.port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        raise TideError(
            f"{config.host}:{config.port} cannot be served on: {error}",
            fix="choose another --port (0 takes one that is free) or --host",
        ) from error


def serve(student: LoadedStudent, config: ServeConfig, bound: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM; responses under way then end with an error."""
    from pipelines.serving.web import Server

    host, port = bound.getsockname()[:2]
    place = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    if not config.local and config.api_key is None:
        logger.warning("whoever reaches this machine can ask: set TIDE_API_KEY to require a key")
    server = Server(student, config, lambda: logger.info("serving %s on %s", config.name, place))
    try:
        server.run(sockets=[bound])  # raises the signal again that ended it
    except KeyboardInterrupt:
        logger.info("served until here")


@contextmanager
def served(student: LoadedStudent, config: ServeConfig) -> Iterator[str]:
    """A server beside other work of this process: its address (without `/v1`), until the block
    ends. TideError where it does not come to listen.
    """
    from pipelines.serving.web import Server

    with bind(config) as bound:
        listening = threading.Event()
        server = Server(student, config, listening.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            if not listening.wait(30):
                raise TideError("the server does not listen after 30 seconds")
            yield f"http://{config.host}:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
