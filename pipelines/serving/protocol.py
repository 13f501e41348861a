"""OpenAI's requests, as far as a student can answer them, and the replies, whole or streamed."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.requests import Request

from pipelines.serving.engine import Job, Piece, Stopping

Count = Annotated[int, Field(ge=1, lt=1 << 31, strict=True)]
Stop = Annotated[str, Field(max_length=1000)]
_LISTED = BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop)
_OFF: list[tuple[str, tuple[Any, ...]]] = [  # what is not built, and values at which it is off
    ("frequency_penalty presence_penalty min_p top_a priority top_logprobs n_probs", (0,)),
    ("no_repeat_ngram_size mirostat dry_multiplier xtc_probability diversity_penalty", (0,)),
    ("epsilon_cutoff eta_cutoff penalty_alpha smoothing_factor dynatemp_range guidance", (0,)),
    ("repetition_penalty repeat_penalty length_penalty typical_p tfs_z best_of num_beams", (1,)),
    ("echo logprobs ignore_eos use_beam_search include_stop_str_in_output", (False,)),
    ("continue_final_message return_token_ids return_full_text early_stopping", (False,)),
    ("add_special_tokens enable_thinking include_reasoning", (False,)),
    ("skip_special_tokens spaces_between_special_tokens add_generation_prompt do_sample", (True,)),
    ("detokenize use_cache", (True,)),
    ("tools functions stop_token_ids bad_words logit_bias documents extra_body", ([], {})),
    ("tool_choice function_call reasoning_effort", ("none", "auto")),
    ("verbosity", ("medium",)),
    ("max_tokens max_completion_tokens seed", (-1,)),
    ("chat_template_kwargs", ({}, {"enable_thinking": False}, {"thinking": False})),
    ("thinking reasoning", ({}, {"type": "disabled"}, {"effort": "none"})),
    ("response_format modalities suffix", ({"type": "text"}, ["text"], "")),
]
_UNREAD = {  # taken: they change no answer, or only that of a parameter which is off
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "cache_prompt", "parallel_tool_calls", "repeat_last_n",
    "mirostat_tau", "mirostat_eta", "xtc_threshold", "dry_base", "dry_allowed_length",
}  # fmt: skip
Events = asyncio.Queue[tuple[int, Piece | Exception]]  # a response's number, and what came of it


class ApiError(Exception):
    """An error as OpenAI's clients read it, with its HTTP status."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Generation(BaseModel):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="forbid")

    model: str
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63, strict=True)] | None = None
    stop: Annotated[list[Stop], Field(max_length=16), _LISTED] | None = None
    n: Count = 1
    # This server's own (with the `openai` client: `extra_body`)
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31, strict=True)] | None = None  # 0 or -1: all
    steps_per_block: Count | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    remasking: Literal["low_confidence", "random"] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 31, strict=True)] | None = None


class ChatRequest(Generation):
    """Of `/v1/chat/completions`."""

    messages: list[Any]
    max_completion_tokens: Count | None = None  # the newer name of `max_tokens`


class CompletionRequest(Generation):
    """Of `/v1/completions`: texts, or their ids."""

    prompt: str | list[Any]


def read_request(kind: type[Generation], body: bytes) -> Any:
    """A request out of its JSON. ApiError (400) with the field that is wrong."""
    values = None
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(body)
    if not isinstance(values, dict):
        raise ApiError(400, "the body is no JSON object", "invalid_value")
    asked = {name: values[name] for name in values.keys() - _UNREAD if values[name] is not None}
    if asked.get("tool_choice") == "none":
        asked.pop("tools", None)
    if isinstance(bias := asked.get("logit_bias"), dict) and not any(bias.values()):
        asked.pop("logit_bias")
    if asked.get("do_sample") is False:  # so others say it
        asked |= {"do_sample": True, "temperature": 0}
    for names, off in _OFF:  # as good as left out
        for name in asked.keys() & names.split():
            if any(asked[name] is v if isinstance(v, bool) else asked[name] == v for v in off):
                del asked[name]
    try:
        return kind.model_validate(asked)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place, code = str((*first["loc"], "the body")[0]), "invalid_value"
        what = f"`{place}` is {first.get('input')!r:.80}: {first['msg']}"
        if first["type"] == "missing":
            what = f"`{place}` is missing"
        elif first["type"] == "extra_forbidden":
            what, code = f"this server has no `{place}`", "unknown_parameter"
        raise ApiError(400, what, code, place) from error


class Reply:
    """The reply to one request, `chat` or text completion: whole, or in chunks."""

    def __init__(self, chat: bool, model: str, prompt_tokens: int, count: int) -> None:
        self.chat, self._prompt_tokens = chat, prompt_tokens
        self.last = [Piece("", 0)] * count  # of each response, so far
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        kind = "chat.completion" if chat else "text_completion"
        self._head = {"id": name, "created": int(time.time()), "model": model, "object": kind}

    def whole(self, texts: Sequence[str]) -> dict[str, Any]:
        """All choices, each a text and why its response ended."""
        choices = []
        for number, (text, piece) in enumerate(zip(texts, self.last, strict=True)):
            message = {"message": {"role": "assistant", "content": text}}
            said = message if self.chat else {"text": text}
            choices.append(_choice(number, said, piece.reason))
        return {**self._head, "choices": choices, "usage": self.usage()}

    def chunk(self, *choices: dict[str, Any], **usage: Any) -> dict[str, Any]:
        """A part of a stream: more of a choice, or at the end the tokens of all."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, **usage}

    def usage(self) -> dict[str, int]:
        prompt, made = self._prompt_tokens, sum(piece.tokens for piece in self.last)
        counts = {"prompt_tokens": prompt, "completion_tokens": made}
        return {**counts, "total_tokens": prompt + made}


def _choice(number: int, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": number, **said, "logprobs": None, "finish_reason": reason}


async def pieces_of(
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


async def stream_of(
    jobs: Sequence[Job], events: Events, reply: Reply, usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: a chunk for each block of each response."""

    def event(body: dict[str, Any]) -> str:
        return f"data: {json.dumps(body)}\n\n"

    try:
        if reply.chat:
            for number in range(len(jobs)):
                speaks = {"delta": {"role": "assistant", "content": ""}}
                yield event(reply.chunk(_choice(number, speaks, None)))
        async for number, piece in pieces_of(jobs, events):
            reply.last[number] = piece
            if piece.text or piece.reason is not None or piece.step:
                said = {"delta": {"content": piece.text}} if reply.chat else {"text": piece.text}
                said |= {"step": piece.step} if piece.step else {}
                yield event(reply.chunk(_choice(number, said, piece.reason)))
        if usage:
            yield event(reply.chunk(usage=reply.usage()))
    except ApiError as error:
        yield event(error.body)
    yield "data: [DONE]\n\n"
