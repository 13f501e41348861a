"""Messages in one shape, whatever they are called where they come from."""

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from shared.system.files import Unusable

Message = dict[str, Any]

_TEXT_PARTS = ("text", "input_text", "output_text")
REASONING = ("reasoning_content", "reasoning", "thinking")
_CALLS = ("function_call", "tool_call")  # ShareGPT's roles: the content is a call, or several
# Other names of the four roles that chat templates know: system, user, assistant and tool.
_ROLES = {"developer": "system"}
_ROLES |= dict.fromkeys(("human", "prompter"), "user")
_ROLES |= dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai", *_CALLS), "assistant")
_ROLES |= dict.fromkeys(("function", "observation", "ipython", "tool_response"), "tool")


def normal_messages(messages: Sequence[Any]) -> list[Message]:
    """Messages in one shape: a known role, a text as content, and what else a template may want.

    Unusable where a message has no role, or a content that is no text.
    """
    normal = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            kind = type(message).__name__
            raise Unusable("not in its form", f"message {number} is a {kind}, not an object")
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or not role:
            raise Unusable("no role", f"message {number} has no `role`")
        older = message.get("function_call")  # OpenAI's, before there were several
        calls = objects(message.get("tool_calls") or (older and [{"function": older}]))
        content = _content(number, message, bool(calls))
        if role in _CALLS and not calls and not isinstance(said := objects(content), str):
            calls, content = said if isinstance(said, list) else [said], ""
        clean: Message = {"role": _ROLES.get(role.lower(), role.lower()), "content": content}
        # What an answer has beside its content.
        if calls:
            kind, calls = {"type": "function"}, calls if isinstance(calls, list) else [calls]
            calls = [
                {**kind, "function": c} if isinstance(c, dict) and "name" in c else c for c in calls
            ]
            if not all(isinstance(c, dict) and isinstance(c.get("function"), dict) for c in calls):
                raise Unusable("not in its form", f"message {number}: `tool_calls` are no calls")
            clean["tool_calls"] = calls
        thoughts = [t for t in map(message.get, REASONING) if isinstance(t, str) and t.strip()]
        if thoughts:
            clean["reasoning_content"] = thoughts[0]
        for name in ("name", "tool_call_id"):
            if message.get(name):
                clean[name] = str(message[name])
        try:
            json.dumps(clean, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            lone = isinstance(error, UnicodeEncodeError)
            reason = "lone surrogates" if lone else "not in its form"
            raise Unusable(reason, f"message {number} cannot be encoded: {error}") from error
        normal.append(clean)
    return normal


def objects(value: Any, calls: bool = True) -> Any:
    """Calls or tools, with the JSON read that stands in them as text: templates write it anew."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            read = json.loads(value or "{}")
            value = read if isinstance(read, dict | list) else value
    if calls and isinstance(value, list):
        return [objects(item) for item in value]
    if calls and isinstance(value, dict):
        inside = {"function": True, "arguments": False, "parameters": False}
        return {k: objects(v or "", inside[k]) if k in inside else v for k, v in value.items()}
    return value


def _content(number: int, message: Message, calls: bool) -> str:
    """A text, or the texts of a list of parts. Beside tool calls it may be missing."""
    content = message.get("content", message.get("value"))
    if content is None and calls:
        return ""
    text = ""
    for part in content if isinstance(content, list) else [content]:
        kind, words = type(part).__name__, part
        if isinstance(content, list) and isinstance(part, dict):  # {"type": "text", "text": …}
            kind = part.get("type", "text")
            words = part.get("text", part.get("content")) if kind in _TEXT_PARTS else None
        if not isinstance(words, str):
            reason = f"the content of message {number} is or has {kind}, which is no text"
            raise Unusable("content is no text", reason)
        text += words
    return text
