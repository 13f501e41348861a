"""OpenAI's requests, as far as a student can answer them, and the replies."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.serving.engine import Piece

Count = Annotated[int, Field(ge=1, strict=True)]


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
    """What both kinds of request have. The parameters of the second group are this server's own
    (with the `openai` client: `extra_body`).
    """

    model_config = ConfigDict(extra="forbid")

    # What changes no answer is taken and not read. What is not built is refused by name, unless it
    # has one of the values at which it changes nothing.
    ignored: ClassVar[set[str]] = {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    }  # fmt: skip
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
        "logprobs": (False,),
    }  # fmt: skip

    model: str
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(strict=True)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Count | None = None

    top_k: Count | None = None
    steps_per_block: Count | None = None
    threshold: Annotated[float, Field(ge=0, lt=1)] | None = None
    remasking: Literal["low_confidence", "random"] | None = None
    min_tokens: Annotated[int, Field(ge=0, strict=True)] | None = None


class ChatRequest(Generation):
    """Of `/v1/chat/completions`."""

    ignored = Generation.ignored | {"parallel_tool_calls"}
    neutral = {
        **Generation.neutral, "response_format": ({"type": "text"},), "top_logprobs": (),
        "tools": ([],), "tool_choice": ("none", "auto"), "modalities": (["text"],),
    }  # fmt: skip

    messages: list[Any]
    max_completion_tokens: Count | None = None  # the newer name of `max_tokens`


class CompletionRequest(Generation):
    """Of `/v1/completions`: texts, or their ids."""

    neutral = {**Generation.neutral, "echo": (False,), "suffix": ("",), "best_of": (1,)}

    prompt: str | list[str] | list[int] | list[list[int]]


def read_request(kind: type[Generation], body: bytes) -> Any:
    """A request out of its JSON. ApiError (400) with the field that is wrong."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}", "invalid_value") from error
    if not isinstance(values, dict):
        raise ApiError(400, "the body is no JSON object", "invalid_value")
    asked = {}
    for name, value in values.items():
        if name in kind.ignored:
            continue
        if name not in kind.neutral:
            asked[name] = value
        # a number is not a truth value
        elif value is not None and (type(value), value) not in [
            (type(own), own) for own in kind.neutral[name]
        ]:
            what = f"`{name}` is {str(value)[:80]!r}: this server cannot do it; leave it out"
            raise ApiError(400, what, "unknown_parameter", name)
    try:
        return kind.model_validate(asked)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            what, code = f"this server has no `{place}`", "unknown_parameter"
        else:
            what, code = f"`{place}` is {first.get('input')!r:.80}: {first['msg']}", "invalid_value"
        raise ApiError(400, what, code, place) from error


class Reply:
    """The reply to one request, whole or in chunks; `chat` or text completion."""

    def __init__(self, chat: bool, model: str, prompt_tokens: int) -> None:
        self._chat, self._prompt_tokens = chat, prompt_tokens
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": name, "created": int(time.time()), "model": model}

    def whole(self, texts: Sequence[str], last: Sequence[Piece]) -> dict[str, Any]:
        """All choices, each a text and the last piece of its response."""
        choices = []
        for number, (text, piece) in enumerate(zip(texts, last, strict=True)):
            message = {"message": {"role": "assistant", "content": text}}
            said = message if self._chat else {"text": text}
            choices.append(_choice(number, said, piece.reason))
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage(last)}

    def chunk(self, number: int, piece: Piece | None) -> dict[str, Any]:
        """More of one choice; without a piece the chunk of a chat that says who speaks."""
        if piece is None:
            said, reason = {"delta": {"role": "assistant", "content": ""}}, None
        else:
            said = {"delta": {"content": piece.text}} if self._chat else {"text": piece.text}
            reason = piece.reason
        return self._chunk(choices=[_choice(number, said, reason)])

    def usage(self, last: Sequence[Piece]) -> dict[str, Any]:
        """The chunk behind the last, where a request wants it."""
        return self._chunk(choices=[], usage=self._usage(last))

    def _chunk(self, **content: Any) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, **content}

    def _usage(self, last: Sequence[Piece]) -> dict[str, int]:
        prompt, made = self._prompt_tokens, sum(piece.tokens for piece in last)
        counts = {"prompt_tokens": prompt, "completion_tokens": made}
        return {**counts, "total_tokens": prompt + made}


def _choice(number: int, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": number, **said, "logprobs": None, "finish_reason": reason}
