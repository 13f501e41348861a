"""OpenAI's requests, as far as a student can answer them, and the replies.

What changes an answer and is not built is refused by name, unless it has its neutral value; what changes none (`user`,
`metadata`, …) is taken and not read. `top_k`, `steps_per_block`, `threshold`, `remasking` and `min_tokens` are this
server's own (with the `openai` client: `extra_body`).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.serving.answer import Piece

Count = Annotated[int, Field(ge=1, strict=True)]


class Only:
    """Of a parameter that is not built: the values at which it changes nothing."""

    def __init__(self, *neutral: Any) -> None:
        self._neutral = neutral

    def allows(self, value: Any) -> bool:
        """Left out, or one of them; a number is not a truth value."""
        return value is None or any(value == own and isinstance(value, bool) == isinstance(own, bool)
                                    for own in self._neutral)  # fmt: skip


class ApiError(Exception):
    """An error as OpenAI's clients read it, with its HTTP status."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class Asked(BaseModel):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="forbid")

    model: str
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(strict=True)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Count | None = None

    top_k: Count | None = None
    steps_per_block: Count | None = None
    threshold: Annotated[float, Field(ge=0, lt=1)] | None = None
    remasking: Literal["low_confidence", "random"] | None = None
    min_tokens: Annotated[int, Field(ge=0, strict=True)] | None = None

    frequency_penalty: Annotated[Any, Only(0)] = None
    presence_penalty: Annotated[Any, Only(0)] = None
    logit_bias: Annotated[Any, Only({})] = None

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the tokens used."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def limit(self) -> int | None:
        """Tokens of a response, at most; None where the request leaves it to the server."""
        return self.max_tokens


class ChatRequest(Asked):
    """Of `/v1/chat/completions`."""

    messages: list[Any]
    max_completion_tokens: Count | None = None
    response_format: Annotated[Any, Only({"type": "text"})] = None
    logprobs: Annotated[Any, Only(False)] = None
    top_logprobs: Annotated[Any, Only()] = None
    tools: Annotated[Any, Only([])] = None
    tool_choice: Annotated[Any, Only("none", "auto")] = None
    parallel_tool_calls: Any = None
    modalities: Annotated[Any, Only(["text"])] = None

    @property
    def limit(self) -> int | None:
        """`max_completion_tokens`, or its older name."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Asked):
    """Of `/v1/completions`: texts, or their ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: Annotated[Any, Only(False)] = None
    suffix: Annotated[Any, Only("")] = None
    best_of: Annotated[Any, Only(1)] = None
    logprobs: Annotated[Any, Only(False)] = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """One or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(part, int) for part in self.prompt):
            return [list(self.prompt)] if self.prompt else []  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


def read(kind: type[Asked], body: bytes) -> Any:
    """A request out of its JSON. ApiError (400) with the field that is wrong."""
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(
            str(part) for part in first["loc"] if isinstance(part, int) or part in kind.model_fields
        )
        place = place or ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ApiError(
                400, f"this server has no `{place}`", "unknown_parameter", place
            ) from error
        came = repr(first.get("input"))
        came = came if len(came) < 80 else came[:77] + "…"
        what = f"`{place}` is {came}: {first['msg']}" if place else first["msg"]
        raise ApiError(400, what, "invalid_value", place or None) from error
    for name, field in kind.model_fields.items():
        value = getattr(asked, name)
        if not all(rule.allows(value) for rule in field.metadata if isinstance(rule, Only)):
            what = f"`{name}` is {str(value)[:80]!r}: this server cannot do it; leave it out"
            raise ApiError(400, what, "unknown_parameter", name)
    return asked


class Reply:
    """The reply to one request, whole or in chunks; `chat` or text completion."""

    def __init__(self, chat: bool, model: str, prompt_tokens: int) -> None:
        self._chat, self._prompt_tokens = chat, prompt_tokens
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: Sequence[str], last: Sequence[Piece]) -> dict[str, Any]:
        """All choices, each a text and the last piece of its response."""
        said = [
            {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            for text in texts
        ]
        choices = [self._choice(i, *pair) for i, pair in enumerate(zip(said, last, strict=True))]
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage(last)}

    def first(self, number: int) -> dict[str, Any]:
        """The chunk of a chat that says who speaks."""
        return self._chunk(
            [self._choice(number, {"delta": {"role": "assistant", "content": ""}}, None)]
        )

    def chunk(self, number: int, piece: Piece) -> dict[str, Any]:
        """More of one choice."""
        text = {"delta": {"content": piece.text}} if self._chat else {"text": piece.text}
        return self._chunk([self._choice(number, text, piece)])

    def usage(self, last: Sequence[Piece]) -> dict[str, Any]:
        """The chunk behind the last, where a request wants it."""
        return {**self._chunk([]), "usage": self._usage(last)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk" if self._chat else "text_completion",
                "choices": choices}  # fmt: skip

    def _choice(self, number: int, text: dict[str, Any], piece: Piece | None) -> dict[str, Any]:
        reason = None if piece is None else piece.reason
        return {"index": number, **text, "logprobs": None, "finish_reason": reason}

    def _usage(self, last: Sequence[Piece]) -> dict[str, int]:
        made = sum(piece.tokens for piece in last)
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": made,
                "total_tokens": self._prompt_tokens + made}  # fmt: skip
