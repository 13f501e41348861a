"""What the rest of the program sees of a row of data: a conversation, or the reason why there is none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatExample:
    """A conversation that ends with an answer.

    `id` is its identity: all that is random about it follows from it. It comes from the content (and, for a repeat,
    from the occurrence), never from `label`, which is the row's own id.
    """

    id: str
    messages: tuple[Message, ...]
    tools: Any = None
    label: str = ""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it stands, and why, in a few words and in one sentence."""

    place: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.detail or self.reason}"


def content_key(messages: Iterable[Message], tools: Any = None) -> str:
    """24 hexadecimal digits from the content: the same conversation has the same key wherever it stands."""
    content = list(messages) if tools is None else [list(messages), tools]
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def content_of(name: str) -> str:
    """The content's key in an id."""
    return name.partition("#")[0]


def identity(key: str, occurrence: int) -> str:
    """The id of the n-th row with the content `key` (from 0)."""
    return key if occurrence == 0 else f"{key}#{occurrence}"
