"""The routes: `/v1/chat/completions`, `/v1/completions`, `/v1/models`, `/health`."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pipelines.serving.answer import Answer, Piece
from pipelines.serving.engine import Engine, Event, Full, Job, Stopping
from pipelines.serving.protocol import ApiError, Asked, ChatRequest, CompletionRequest, Reply, read
from pipelines.serving.settings import ServeConfig
from shared.data.reading import waiting_messages
from shared.system.errors import TideError
from student_train.using.decoding import Row
from student_train.using.load import LoadedStudent
from student_train.using.settings import SampleConfig
from student_train.using.stops import Stops

_LOOK = 0.5
"""Seconds, at most, between two looks whether whoever asked is still there."""


def make_app(student: LoadedStudent, config: ServeConfig, engine: Engine) -> Starlette:
    """The application; the engine is started and stopped by whoever runs it."""
    routes = _Routes(student, config, engine)
    hosts = ["127.0.0.1", "localhost", "[::1]"] if config.local else ["*"]
    return Starlette(
        routes=[
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/completions", routes.complete, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/health", routes.health),
        ],
        # A page of some site must not reach a local server under a name that resolves to it.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={
            ApiError: _explain,
            HTTPException: _explain_http,
            Exception: _explain_bug,
        },
    )


class _Routes:
    def __init__(self, student: LoadedStudent, config: ServeConfig, engine: Engine) -> None:
        self._student, self._config, self._engine = student, config, engine
        self._length = int(getattr(student.model.config, "max_position_embeddings", 0)) or None

    async def health(self, _: Request) -> Response:
        running, waiting = self._engine.load
        state = {"status": "ok" if self._engine.alive else "down", "running": running, "waiting": waiting,
                 "batch": self._config.batch}  # fmt: skip
        return JSONResponse(state, 200 if self._engine.alive else 503)

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self._check_key(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self._config.name, "object": "model", "created": 0, "owned_by": "tide-distill",
                "max_model_len": self._length}  # fmt: skip

    async def chat(self, request: Request) -> Response:
        asked: ChatRequest = await self._read(request, ChatRequest)
        prompt = await run_in_threadpool(self._chat_prompt, asked.messages)
        return await self._reply(request, asked, [prompt], chat=True)

    async def complete(self, request: Request) -> Response:
        asked: CompletionRequest = await self._read(request, CompletionRequest)
        prompts = await run_in_threadpool(self._text_prompts, asked.prompts)
        return await self._reply(request, asked, prompts, chat=False)

    async def _read(self, request: Request, kind: type[Asked]) -> Any:
        self._check_key(request)
        asked = read(kind, await self._body(request))
        self._check_model(asked.model)
        return asked

    async def _body(self, request: Request) -> bytes:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > self._config.body_bytes:
                raise ApiError(
                    413, f"the request has more than {self._config.body_bytes:,} bytes", "too_large"
                )
        return body

    def _check_key(self, request: Request) -> None:
        key = self._config.api_key
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise ApiError(401, "the API key is missing or wrong", "invalid_api_key")

    def _check_model(self, name: str) -> None:
        if name != self._config.name:
            raise ApiError(
                404,
                f"no model {name!r} here; there is {self._config.name!r}",
                "model_not_found",
                "model",
            )

    def _chat_prompt(self, messages: list[Any]) -> list[int]:
        try:
            clean = waiting_messages(messages)
            with self._engine.tokenizing:
                return self._student.prompt(clean)
        except (TideError, RecursionError) as error:
            raise ApiError(
                400, getattr(error, "what", str(error)), "invalid_value", "messages"
            ) from error

    def _text_prompts(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        if not prompts or not all(prompts):
            raise ApiError(400, "a prompt is empty", "invalid_value", "prompt")
        vocabulary = len(self._student.tokenizer)
        found = []
        for prompt in prompts:
            if isinstance(prompt, str):
                try:
                    prompt.encode()
                except UnicodeEncodeError as error:
                    raise ApiError(
                        400, "the prompt has lone surrogates", "invalid_value", "prompt"
                    ) from error
                with self._engine.tokenizing:
                    found.append(self._student.tokenizer.encode([prompt])[0])
            elif all(0 <= token < vocabulary for token in prompt):
                found.append(prompt)
            else:
                raise ApiError(
                    400,
                    f"the prompt has ids outside 0 … {vocabulary - 1}",
                    "invalid_value",
                    "prompt",
                )
        return found

    def _sampling(self, asked: Asked, prompt: Sequence[int], number: int) -> SampleConfig:
        """How one response is sampled; ApiError where it does not fit the student's length."""
        own = self._config.sampling
        given = {
            "temperature": asked.temperature, "top_k": asked.top_k, "top_p": asked.top_p,
            "steps_per_block": asked.steps_per_block, "threshold": asked.threshold, "remasking": asked.remasking,
            "min_new_tokens": asked.min_tokens,
        }  # fmt: skip
        room = None
        if self._length is not None:
            room = (
                (self._length - -(-len(prompt) // own.block) * own.block) // own.block * own.block
            )
            if max(asked.limit or 1, 1) > room:
                more = f" and {asked.limit} of the response" if asked.limit else ""
                raise ApiError(
                    400,
                    f"{len(prompt)} tokens of the prompt{more}, in blocks of {own.block}, are more than the student's "
                    f"{self._length}",
                    "context_length_exceeded",
                )
        limit = asked.limit or min(own.new_tokens, room or own.new_tokens)
        seed = secrets.randbelow(1 << 31) if asked.seed is None else asked.seed
        try:
            changed = {name: value for name, value in given.items() if value is not None}
            return replace(own, new_tokens=limit, seed=seed + number, **changed)
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value") from error

    async def _reply(
        self, request: Request, asked: Asked, prompts: list[list[int]], chat: bool
    ) -> Response:
        copies = asked.n or 1
        if copies * len(prompts) > self._config.batch:
            most = self._config.batch
            raise ApiError(
                400,
                f"{copies * len(prompts)} responses are asked for, at most {most} may be",
                param="n",
            )
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
        jobs: list[Job] = []
        for prompt in prompts:
            for number in range(copies):
                config = self._sampling(asked, prompt, number)
                answer = Answer(Stops.of(self._student, asked.stop), config.new_tokens)

                def deliver(event: Event, number: int = len(jobs)) -> None:
                    loop.call_soon_threadsafe(events.put_nowait, (number, event))

                jobs.append(Job(Row(prompt, config), answer, deliver))
        try:
            self._engine.submit(jobs)
        except Full as error:
            raise ApiError(503, "too many requests wait; try again later", "overloaded") from error
        reply = Reply(chat, self._config.name, sum(map(len, prompts)))
        if asked.stream:
            stream = _stream(reply, jobs, events, chat, asked.wants_usage)
            return StreamingResponse(
                stream, media_type="text/event-stream", headers={"cache-control": "no-cache"}
            )
        texts, last = [""] * len(jobs), [Piece("", 0)] * len(jobs)
        async for number, piece in _pieces(jobs, events, request):
            texts[number], last[number] = texts[number] + piece.text, piece
        return JSONResponse(reply.whole(texts, last))


async def _pieces(
    jobs: Sequence[Job], events: asyncio.Queue[tuple[int, Event]], request: Request | None = None
) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces of all responses as they come, until each has its last. Whoever stops listening cancels them; with
    `request`, so does whoever hangs up. ApiError (500) where decoding failed.
    """
    left = len(jobs)
    try:
        while left:
            if request is not None and await request.is_disconnected():
                raise ApiError(499, "whoever asked has hung up")
            try:
                number, event = await asyncio.wait_for(events.get(), _LOOK)
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
    reply: Reply,
    jobs: Sequence[Job],
    events: asyncio.Queue[tuple[int, Event]],
    chat: bool,
    usage: bool,
) -> AsyncIterator[str]:
    """Server-sent events: a chunk for each block of each response."""
    last = [Piece("", 0)] * len(jobs)
    try:
        if chat:
            for number in range(len(jobs)):
                yield _event(reply.first(number))
        async for number, piece in _pieces(jobs, events):
            last[number] = piece
            if piece.text or piece.reason is not None:
                yield _event(reply.chunk(number, piece))
        if usage:
            yield _event(reply.usage(last))
    except ApiError as error:
        yield _event(error.body)
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _explain(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"retry-after": "1"} if error.status == 503 else None
    return JSONResponse(error.body, error.status, headers)


def _explain_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _explain(
        request, ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    )


def _explain_bug(request: Request, error: Exception) -> Response:
    return _explain(request, ApiError(500, f"{type(error).__name__}: {error}"))
