"""`tide serve`: a student behind `/v1/chat/completions`, `/v1/completions`, `/v1/models` and
`/health`. What the command runs, and what each route does.
"""

import asyncio
import hmac
import logging
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from queue import Full
from typing import Any

from pipelines.serving.engine import Answer, Engine, Job, Piece, ServeConfig
from pipelines.serving.prompts import Prompts
from shared.system.files import TideError
from student_train.using.decoding import Row
from student_train.using.settings import SampleConfig
from student_train.using.student import LoadedStudent, Stops

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    from pipelines.serving import front, protocol
    from pipelines.serving.protocol import ApiError, Generation
except ImportError as error:
    what = "starlette and uvicorn must be installed to serve"
    raise TideError(what, fix='pip install ".[serve]"') from error

logger = logging.getLogger(__name__)
_SMALL = 1 << 15  # bytes of a request that is tokenised at once
_SAMPLING = ("temperature", "top_k", "top_p", "steps_per_block", "threshold", "remasking")


def served_name(place: str) -> str:
    """What a student is called: its hub id, its run, or its folder."""
    if not Path(place).exists():
        return place
    path = Path(place).resolve()
    return path.parent.name if path.name == "model" else path.name


def bind(config: ServeConfig) -> socket.socket:
    """The socket, taken before a model is loaded. TideError where the address cannot be had."""
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((config.host, config.port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        what = f"{config.host}:{config.port} cannot be served on: {error}"
        raise TideError(what, fix="choose another --port (0: any free one) or --host") from error


def serve(student: LoadedStudent, config: ServeConfig, bound: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM; responses under way then end with an error."""
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


class Server(uvicorn.Server):
    """Of one student. `started_to_listen` is called once requests are taken."""

    def __init__(
        self, student: LoadedStudent, config: ServeConfig, started_to_listen: Callable[[], None]
    ) -> None:
        self._engine = Engine(student, config)
        self._tell = started_to_listen
        routes = Routes(student, config, self._engine)
        self._prompts = routes.prompts
        # The door first; behind it browsers are told which other origins' pages may read answers.
        allowed: Any = {"allow_methods": ("GET", "POST"), "allow_headers": ("*",)}
        allowed |= {"allow_origins": config.cors, "allow_private_network": True}
        browsers = [Middleware(CORSMiddleware, **allowed)] if config.cors else []
        explained = (ApiError, HTTPException, ClientDisconnect, Exception)
        app = Starlette(
            routes=[
                front.page(),
                Route("/v1/chat/completions", routes.chat, methods=["POST"]),
                Route("/v1/completions", routes.complete, methods=["POST"]),
                Route("/v1/models", routes.models),
                Route("/v1/models/{name:path}", routes.models),
                Route("/health", routes.health),
            ],
            middleware=[Middleware(front.door, config), *browsers],
            exception_handlers=dict.fromkeys(explained, front.explain),
        )
        # Connections get five seconds to take their last words.
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.start()
        await super().startup(sockets)
        self._tell()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await run_in_threadpool(self._engine.stop)  # which tells all who wait
        self._prompts.close()
        await super().shutdown(sockets)


class Routes:
    """What each does with a request; ApiError where it cannot be answered."""

    def __init__(self, student: LoadedStudent, config: ServeConfig, engine: Engine) -> None:
        self._student, self._config, self._engine = student, config, engine
        self.prompts = Prompts(student.tokenizer, engine.tokenizing, config.prompt_seconds)
        self._length = int(getattr(student.model.config, "max_position_embeddings", 0)) or None

    async def health(self, _: Request) -> Response:
        alive, running, waiting = self._engine.load()
        status, code = ("ok", 200) if alive else ("down", 503)
        state = {"running": running, "waiting": waiting, "batch": self._config.batch}
        return JSONResponse({"status": status, **state}, code)

    async def models(self, request: Request) -> Response:
        """The one there is, in a list or by its name."""
        self._check_key(request)
        card = {"id": self._config.name, "object": "model", "created": 0}
        card |= {"owned_by": "tide-distill", "max_model_len": self._length}
        card["sampling"] = asdict(self._config.sampling)  # where a request does not say
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [card]})
        self._check_model(request.path_params["name"])
        return JSONResponse(card)

    async def chat(self, request: Request) -> Response:
        asked, large = await self._read(request, protocol.ChatRequest)
        prompts = await self._ids(asked.messages, True, large)
        limit = asked.max_completion_tokens or asked.max_tokens
        return await self._reply(request, asked, prompts, limit, chat=True)

    async def complete(self, request: Request) -> Response:
        asked, large = await self._read(request, protocol.CompletionRequest)
        many = isinstance(asked.prompt, list) and not all(
            type(part) is int for part in asked.prompt
        )
        wanted = asked.prompt if many else [asked.prompt]
        prompts = await self._ids(wanted, False, large)
        return await self._reply(request, asked, prompts, asked.max_tokens, chat=False)

    async def _read(self, request: Request, kind: type[Generation]) -> tuple[Any, bool]:
        """The request, and whether it is large."""
        self._check_key(request)
        body, most = b"", self._config.body_bytes
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise ApiError(413, f"the request has more than {most:,} bytes", "too_large")
        asked = protocol.read_request(kind, body)
        self._check_model(asked.model)
        return asked, len(body) > _SMALL

    def _check_key(self, request: Request) -> None:
        key = self._config.api_key
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise ApiError(401, "the API key is missing or wrong", "invalid_api_key")

    def _check_model(self, name: str) -> None:
        if name != self._config.name:
            what = f"no model {name!r} here; there is {self._config.name!r}"
            raise ApiError(404, what, "model_not_found", "model")

    async def _ids(self, asked: list[Any], chat: bool, large: bool) -> list[list[int]]:
        found = await self.prompts.encode(asked, chat, large)
        if isinstance(found, str):
            raise ApiError(400, found, "invalid_value", "messages" if chat else "prompt")
        return found

    def _sampling(
        self, asked: Generation, limit: int | None, prompt: Sequence[int], seed: int
    ) -> SampleConfig:
        """How one response is sampled; ApiError where it does not fit the student's length."""
        own = self._config.sampling
        room = own.new_tokens
        if self._length is not None:
            room = self._length // own.block * own.block - len(prompt)
            if (limit or 1) > room:
                more = f" and {limit} of the response" if limit else ""
                what = f"{len(prompt)} tokens of the prompt{more}, in blocks of {own.block}"
                what += f", are more than the student's {self._length}"
                raise ApiError(400, what, "context_length_exceeded")
        given = {name: getattr(asked, name) for name in _SAMPLING}
        given = {name: value for name, value in given.items() if value is not None}
        given |= {"new_tokens": limit or min(own.new_tokens, room), "seed": seed}
        try:
            return replace(own, min_new_tokens=asked.min_tokens or own.min_new_tokens, **given)
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value") from error

    async def _reply(
        self, request: Request, asked: Generation, prompts: list[list[int]], limit: int | None,
        chat: bool,
    ) -> Response:  # fmt: skip
        # 1. A job for each response
        if (count := asked.n * len(prompts)) > self._config.batch:
            what = f"{count} responses are asked for, at most {self._config.batch} may be"
            raise ApiError(400, what, param="n")
        loop, events = asyncio.get_running_loop(), protocol.Events()
        options = asked.stream_options or {} if asked.stream else {}
        jobs: list[Job] = []
        for prompt in prompts:
            first = secrets.randbelow(1 << 31) if asked.seed is None else asked.seed
            for seed in range(first, first + asked.n):
                config = self._sampling(asked, limit, prompt, seed)
                answer = Answer(Stops.of(self._student, asked.stop), config.new_tokens)

                def deliver(event: Piece | Exception, number: int = len(jobs)) -> None:
                    loop.call_soon_threadsafe(events.put_nowait, (number, event))

                steps = bool(options.get("include_steps"))
                jobs.append(Job(Row(prompt, config), answer, deliver, steps))
        try:
            self._engine.submit(jobs)
        except Full as error:
            raise ApiError(503, "too many requests wait; try again later", "overloaded") from error
        # 2. Their pieces, as they come or put together
        reply = protocol.Reply(chat, self._config.name, sum(map(len, prompts)), count)
        request.state.reply = reply  # for the log
        if asked.stream:
            stream = protocol.stream_of(jobs, events, reply, bool(options.get("include_usage")))
            headers = {"cache-control": "no-cache"}
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        texts = [""] * count
        async for number, piece in protocol.pieces_of(jobs, events, request):
            texts[number] += piece.text
            reply.last[number] = piece
        return JSONResponse(reply.whole(texts))
