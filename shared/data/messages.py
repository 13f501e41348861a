"""Messages as people write them, in one shape: the roles that chat templates know, contents as texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from shared.data.conversation import Message
from shared.system.errors import Unusable

_ROLES = {
    "developer": "system",
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""Other names of the four roles system, user, assistant and tool."""

_REASONING = ("reasoning_content", "reasoning", "thinking")
_KEPT = ("name", "tool_call_id")


def normal_messages(messages: Sequence[Any]) -> list[Message]:
    """Messages with role and content, and what else a template may want. Unusable where one has no text."""
    return [_normal(i, message) for i, message in enumerate(messages)]


def _normal(number: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise Unusable(
            "not in its form", f"message {number} is a {type(message).__name__}, not an object"
        )
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or not role:
        raise Unusable("no role", f"message {number} has no `role`")
    calls = message.get("tool_calls")
    content = _content(number, message.get("content", message.get("value")), bool(calls))
    clean: Message = {"role": _ROLES.get(role.lower(), role.lower()), "content": content}
    if calls:
        clean["tool_calls"] = calls
    for name in _REASONING:
        if isinstance(message.get(name), str) and message[name].strip():
            clean["reasoning_content"] = _encodable(number, message[name])
            break
    return clean | {name: str(message[name]) for name in _KEPT if message.get(name)}


def _content(number: int, content: Any, may_be_empty: bool) -> str:
    if content is None and may_be_empty:
        return ""
    if isinstance(content, list):
        parts = [part if isinstance(part, str) else _part(number, part) for part in content]
        content = "".join(parts)
    if not isinstance(content, str):
        raise Unusable(
            "content is no text",
            f"the content of message {number} is {type(content).__name__}, not text",
        )
    return _encodable(number, content)


def _part(number: int, part: Any) -> str:
    """The text of one part of a content: `{"type": "text", "text": …}`."""
    if isinstance(part, dict) and part.get("type", "text") in ("text", "input_text", "output_text"):
        text = part.get("text", part.get("content"))
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise Unusable(
        "content is no text", f"the content of message {number} has a part that is no text ({kind})"
    )


def _encodable(number: int, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unusable(
            "lone surrogates",
            f"the content of message {number} has lone surrogates, which no tokenizer can encode",
        ) from error
    return text


def cut_after_last_answer(messages: list[Message]) -> list[Message]:
    """The conversation up to its last answer: what a user says behind it is answered by nobody. Unusable without
    any.
    """
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not answers:
        roles = ", ".join(m["role"] for m in messages)
        raise Unusable("no answer", f"no message is from the assistant (roles: {roles})")
    return messages[: answers[-1] + 1]


def tools_of(value: Any) -> Any:
    """Tools as a template wants them: a list; a text is read as JSON. None where there are none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise Unusable(
                "not in its form", f"`tools` is a text that is no JSON: {str(error)[:80]}"
            ) from error
    return value or None
