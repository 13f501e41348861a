"""Where the contents of a conversation stand in its text: marked by sentinels, then located."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
Messages = Sequence[Message]
Span = tuple[int, int]  # start and end, in characters of a text

EXTRAS = ("tool_calls", "reasoning_content")  # parts of an answer beside its content
_SENTINEL = re.compile("\ue000tide-(\\d+)\ue001")  # private-use: no content contains it


def contents_of(messages: Messages) -> list[str]:
    return [str(message.get("content") or "") for message in messages]


def sentinel(index: int) -> str:
    return f"\ue000tide-{index}\ue001"


def with_sentinels(messages: Messages) -> list[Message]:
    # A missing content beside calls has none: some templates write either.
    there = [bool(m.get("content") or not m.get("tool_calls")) for m in messages]
    return [{**m, "content": sentinel(i) * there[i]} for i, m in enumerate(messages)]


def pieces_of(text: str, probes: Messages) -> list[str] | None:
    """`text` cut at its sentinels; None where one is missing, stands twice or out of order."""
    parts = _SENTINEL.split(text)  # piece, number, piece, …; a message may have none
    if parts[1::2] != [str(i) for i, probe in enumerate(probes) if probe["content"]]:
        return None
    pieces = iter(parts[::2])
    return [next(pieces), *(next(pieces) if probe["content"] else "" for probe in probes)]


def unplaced_of(messages: Messages, tools: Any, spans: list[Span] | None) -> list[str]:
    beside = [tools, *(message.get(name) for message in messages for name in EXTRAS)]
    texts = [] if spans is not None else contents_of(messages)
    return texts + [json.dumps(each, ensure_ascii=False) for each in beside if each]


def locate_contents(pieces: Sequence[str], messages: Messages, text: str) -> list[Span] | None:
    """The span of every content, where `text` is `pieces` joined by the contents, each verbatim or
    stripped as templates do; None where it is not.
    """
    spans: list[Span] = []
    at = len(pieces[0])
    for i, content in enumerate(contents_of(messages)):
        kept = [content]
        if messages[i]["role"] == "assistant" and i < len(messages) - 1:
            kept.append(content.rpartition("</think>")[2])  # the thoughts of earlier answers go
        ways = [*kept]
        for words in kept:
            for blanks in (None, "\n"):
                ways += [words.strip(blanks), words.rstrip(blanks), words.lstrip(blanks)]
        written = next((way for way in ways if text.startswith(way + pieces[i + 1], at)), None)
        if written is None:
            return None
        spans.append((at, at + len(written)))
        at += len(written) + len(pieces[i + 1])
    return spans if at == len(text) and text.startswith(pieces[0]) else None


def own_words(text: str, start: int, stop: int, content: str | None) -> Span | None:
    """An answer's own words inside start … stop: `content` verbatim behind white space, or
    stripped. None where they are other words. Without `content`: all but white space in front.
    """
    region = text[start:stop]
    words = region.lstrip() if content is None else content
    if not region.endswith(words) or region[: len(region) - len(words)].strip():
        words = words.strip()
        if region.strip() != words:
            return None
    first = start + region.rfind(words)
    return first, first + len(words)
