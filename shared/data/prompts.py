"""Conversations that wait for an answer, out of the same files as data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.data.conversation import Message
from shared.data.files import file_rows
from shared.data.messages import normal_messages
from shared.data.reading import decode
from shared.system.errors import TideError, Unusable

_TEXTS = ("prompt", "question", "instruction")
_LISTS = ("messages", "conversations", "prompt")


def read_prompts(path: Path) -> list[list[Message]]:
    """Of every row the messages that are to be answered. TideError with the place of the first row that has none."""
    if not path.is_file():
        raise TideError(f"there is no file {path}", expected="JSONL with `prompt` or `messages`")
    chats = []
    for place, raw in file_rows(path):
        try:
            chats.append(_prompt(decode(raw)))
        except (Unusable, RecursionError) as error:
            raise TideError(
                f"{place} is no prompt: {getattr(error, 'what', error)}",
                expected='{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}',
            ) from error
    if not chats:
        raise TideError(f"{path} has no prompts", expected="a row for each")
    return chats


def waiting_messages(messages: Sequence[Any]) -> list[Message]:
    """Messages that wait for an answer, in one shape. Unusable where there are none, or the last is an answer."""
    clean = normal_messages(messages)
    if not clean:
        raise Unusable("no messages", "there are no messages")
    if clean[-1]["role"] == "assistant":
        raise Unusable(
            "answered",
            "the last message is the assistant's; an answer to it is asked for by nobody",
        )
    return clean


def _prompt(row: Any) -> list[Message]:
    if not isinstance(row, dict):
        raise Unusable("no known form", f"the row is a {type(row).__name__}, not an object")
    for name in _LISTS:
        if isinstance(row.get(name), list) and row[name]:
            messages = normal_messages(row[name])
            while (
                messages and messages[-1]["role"] == "assistant"
            ):  # a row of data: its answer is not the question
                messages.pop()
            return waiting_messages(messages)
    for name in _TEXTS:
        if row.get(name) is not None:
            return normal_messages([{"role": "user", "content": row[name]}])
    raise Unusable("no known form", f"it has the fields {', '.join(map(str, row)) or '(none)'}")
