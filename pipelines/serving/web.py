"""The routes: `/v1/chat/completions`, `/v1/completions`, `/v1/models`, `/health`; and the server
around them, which ends what is under way before it closes.
"""

import asyncio
import hmac
import json
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pipelines.serving.engine import Answer, Engine, Full, Job, Piece, Stopping
from pipelines.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Generation,
    Reply,
    read_request,
)
from pipelines.serving.server import ServeConfig
from shared.data.reading import waiting_messages
from shared.system.errors import TideError
from student_train.using.decoding import Row
from student_train.using.settings import SampleConfig
from student_train.using.student import LoadedStudent, Stops

Events = asyncio.Queue[tuple[int, Piece | Exception]]


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
        routes = Routes(student, config, self._engine)
        hosts = ["127.0.0.1", "localhost", "[::1]"] if config.local else ["*"]
        app = Starlette(
            routes=[
                Route("/v1/chat/completions", routes.chat, methods=["POST"]),
                Route("/v1/completions", routes.complete, methods=["POST"]),
                Route("/v1/models", routes.models),
                Route("/v1/models/{name:path}", routes.model),
                Route("/health", routes.health),
            ],
            # A page of some site must not reach a local server under a name that resolves to it.
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
            exception_handlers=dict.fromkeys((ApiError, HTTPException, Exception), explain),
        )
        # Connections get five seconds to take their last words.
        options = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
        super().__init__(options)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's, and the engine's."""
        self._engine.start()
        await super().startup(sockets)
        self._tell()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """The engine's, which tells all who wait; then uvicorn's."""
        await run_in_threadpool(self._engine.stop)
        await super().shutdown(sockets)


def explain(request: Request, error: Exception) -> Response:
    """Any error as OpenAI's clients read it."""
    if isinstance(error, HTTPException):
        what = f"{request.method} {request.url.path}: {error.detail}"
        error = ApiError(error.status_code, what)
    elif not isinstance(error, ApiError):
        error = ApiError(500, f"{type(error).__name__}: {error}")
    headers = {"retry-after": "1"} if error.status == 503 else None
    return JSONResponse(error.body, error.status, headers)


class Routes:
    """What each does with a request; ApiError where it cannot be answered."""

    def __init__(self, student: LoadedStudent, config: ServeConfig, engine: Engine) -> None:
        self._student, self._config, self._engine = student, config, engine
        self._length = int(getattr(student.model.config, "max_position_embeddings", 0)) or None

    async def health(self, _: Request) -> Response:
        running, waiting = self._engine.load
        status, code = ("ok", 200) if self._engine.alive else ("down", 503)
        state = {"running": running, "waiting": waiting, "batch": self._config.batch}
        return JSONResponse({"status": status, **state}, code)

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_key(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        card = {"id": self._config.name, "object": "model", "created": 0}
        return {**card, "owned_by": "tide-distill", "max_model_len": self._length}

    async def chat(self, request: Request) -> Response:
        asked: ChatRequest = await self._read(request, ChatRequest)
        prompt = await run_in_threadpool(self._chat_prompt, asked.messages)
        limit = asked.max_completion_tokens or asked.max_tokens
        return await self._reply(request, asked, [prompt], limit, chat=True)

    async def complete(self, request: Request) -> Response:
        asked: CompletionRequest = await self._read(request, CompletionRequest)
        prompts = await run_in_threadpool(self._text_prompts, asked.prompt)
        return await self._reply(request, asked, prompts, asked.max_tokens, chat=False)

    async def _read(self, request: Request, kind: type[Generation]) -> Any:
        self._check_key(request)
        body, most = b"", self._config.body_bytes
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise ApiError(413, f"the request has more than {most:,} bytes", "too_large")
        asked = read_request(kind, body)
        self._check_model(asked.model)
        return asked

    def _check_key(self, request: Request) -> None:
        key = self._config.api_key
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise ApiError(401, "the API key is missing or wrong", "invalid_api_key")

    def _check_model(self, name: str) -> None:
        own = self._config.name
        if name != own:
            what = f"no model {name!r} here; there is {own!r}"
            raise ApiError(404, what, "model_not_found", "model")

    def _chat_prompt(self, messages: list[Any]) -> list[int]:
        try:
            clean = waiting_messages(messages)
            with self._engine.tokenizing:
                return self._student.prompt(clean)
        except (TideError, RecursionError) as error:
            what = getattr(error, "what", str(error))
            raise ApiError(400, what, "invalid_value", "messages") from error

    def _text_prompts(self, asked: str | list[Any]) -> list[list[int]]:
        """Ids of one prompt or several, each a text or ids itself."""
        one = isinstance(asked, str) or all(isinstance(part, int) for part in asked)
        prompts = [asked] if one else asked
        if not prompts or not all(prompts):
            raise ApiError(400, "a prompt is empty", "invalid_value", "prompt")
        vocabulary = len(self._student.tokenizer)
        ids = []
        for prompt in prompts:
            if isinstance(prompt, str):
                try:
                    prompt.encode()
                except UnicodeEncodeError as error:
                    what = "the prompt has lone surrogates"
                    raise ApiError(400, what, "invalid_value", "prompt") from error
                with self._engine.tokenizing:
                    ids.append(self._student.tokenizer.encode([prompt])[0])
            elif all(0 <= token < vocabulary for token in prompt):
                ids.append(prompt)
            else:
                what = f"the prompt has ids outside 0 … {vocabulary - 1}"
                raise ApiError(400, what, "invalid_value", "prompt")
        return ids

    def _sampling(
        self, asked: Generation, limit: int | None, prompt: Sequence[int], number: int
    ) -> SampleConfig:
        """How one response is sampled; ApiError where it does not fit the student's length."""
        own = self._config.sampling
        room = own.new_tokens
        if self._length is not None:
            whole_blocks = -(-len(prompt) // own.block) * own.block
            room = (self._length - whole_blocks) // own.block * own.block
            if (limit or 1) > room:
                more = f" and {limit} of the response" if limit else ""
                what = f"{len(prompt)} tokens of the prompt{more}, in blocks of {own.block}"
                what += f", are more than the student's {self._length}"
                raise ApiError(400, what, "context_length_exceeded")
        given = {"min_new_tokens": asked.min_tokens}
        for name in (
            "temperature", "top_k", "top_p", "steps_per_block", "threshold", "remasking",
        ):  # fmt: skip
            given[name] = getattr(asked, name)
        changed = {name: value for name, value in given.items() if value is not None}
        seed = secrets.randbelow(1 << 31) if asked.seed is None else asked.seed
        try:
            tokens = limit or min(own.new_tokens, room)
            return replace(own, new_tokens=tokens, seed=seed + number, **changed)
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value") from error

    async def _reply(
        self,
        request: Request,
        asked: Generation,
        prompts: list[list[int]],
        limit: int | None,
        chat: bool,
    ) -> Response:
        # 1. A job for each response
        copies, most = asked.n or 1, self._config.batch
        if copies * len(prompts) > most:
            what = f"{copies * len(prompts)} responses are asked for, at most {most} may be"
            raise ApiError(400, what, param="n")
        loop, events = asyncio.get_running_loop(), Events()
        jobs: list[Job] = []
        for prompt in prompts:
            for number in range(copies):
                config = self._sampling(asked, limit, prompt, number)
                answer = Answer(Stops.of(self._student, asked.stop), config.new_tokens)

                def deliver(event: Piece | Exception, number: int = len(jobs)) -> None:
                    loop.call_soon_threadsafe(events.put_nowait, (number, event))

                jobs.append(Job(Row(prompt, config), answer, deliver))
        try:
            self._engine.submit(jobs)
        except Full as error:
            raise ApiError(503, "too many requests wait; try again later", "overloaded") from error
        # 2. Their pieces, as they come or put together
        reply = Reply(chat, self._config.name, sum(map(len, prompts)))
        if asked.stream:
            usage = bool((asked.stream_options or {}).get("include_usage"))
            stream = _stream(reply, jobs, events, chat, usage)
            headers = {"cache-control": "no-cache"}
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        texts, last = [""] * len(jobs), [Piece("", 0)] * len(jobs)
        async for number, piece in _pieces(jobs, events, request):
            texts[number] += piece.text
            last[number] = piece
        return JSONResponse(reply.whole(texts, last))


async def _pieces(
    jobs: Sequence[Job], events: Events, request: Request | None = None
) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces of all responses as they come, until each has its last. ApiError where decoding fails.

    Whoever stops listening cancels them; with `request`, so does whoever hangs up.
    """
    left = len(jobs)
    try:
        while left:
            if request is not None and await request.is_disconnected():
                raise ApiError(499, "whoever asked has hung up")
            try:
                number, event = await asyncio.wait_for(events.get(), 0.5)
            except TimeoutError:
                continue
            if isinstance(event, Stopping):
                raise ApiError(503, str(event), "stopping")
            if isinstance(event, Exception):
                raise ApiError(500, f"decoding failed: {event}", "decoding_failed")
            left -= event.reason is not None
            yield number, event
    finally:
        for job in jobs:
            job.cancelled = True


async def _stream(
    reply: Reply, jobs: Sequence[Job], events: Events, chat: bool, usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: a chunk for each block of each response."""

    def event(body: dict[str, Any]) -> str:
        return f"data: {json.dumps(body)}\n\n"

    last = [Piece("", 0)] * len(jobs)
    try:
        if chat:
            for number in range(len(jobs)):
                yield event(reply.chunk(number, None))
        async for number, piece in _pieces(jobs, events):
            last[number] = piece
            if piece.text or piece.reason is not None:
                yield event(reply.chunk(number, piece))
        if usage:
            yield event(reply.usage(last))
    except ApiError as error:
        yield event(error.body)
    yield "data: [DONE]\n\n"
