"""Contents in a rendered chat, by construction: the text must equal fixed pieces joined by what templates make of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

Span = tuple[int, int]
_Change = Callable[[str], str]

_CHANGES: tuple[_Change, ...] = (
    lambda text: text,
    str.strip,
    str.rstrip,
    str.lstrip,
    lambda text: text.strip("\n"),
    lambda text: text.lstrip("\n"),
    lambda text: text.rstrip("\n"),
)
"""What templates do to contents."""


def _after_thinking(text: str) -> str:
    """What templates keep of an earlier answer with a think block."""
    return text.rpartition("</think>")[2]


def joined(
    pieces: Sequence[str], messages: Sequence[Mapping[str, Any]], text: str
) -> list[Span] | None:
    """The span of every content where `text` is `pieces` joined by the contents, all changed alike (answers and the
    others each in their way); None where it is not.
    """
    contents = [str(m.get("content") or "") for m in messages]
    if len(pieces) != len(contents) + 1:
        return None
    answers = [m["role"] == "assistant" for m in messages]
    thinks = any("</think>" in c for c, answer in zip(contents, answers, strict=True) if answer)
    for changed in _ways(contents, answers, thinks):
        if len(text) == sum(map(len, pieces)) + sum(map(len, changed)) and text == _join(
            pieces, changed
        ):
            return _spans(pieces, changed)
    return None


def _ways(contents: list[str], answers: list[bool], thinks: bool) -> Iterator[list[str]]:
    yield contents
    pairs = [(f, f) for f in _CHANGES[1:]] + [
        (f, g) for f, g in product(_CHANGES, _CHANGES) if f is not g
    ]
    for mine, others in pairs:
        yield [(mine if a else others)(c) for c, a in zip(contents, answers, strict=True)]
    if thinks:
        last = max(i for i, a in enumerate(answers) if a)
        for mine, others, own in product(_CHANGES, _CHANGES, _CHANGES):
            changes = (own if i == last else mine if a else others for i, a in enumerate(answers))
            kept = (
                _after_thinking(c) if a and i != last else c
                for i, (c, a) in enumerate(zip(contents, answers, strict=True))
            )
            yield [change(c) for change, c in zip(changes, kept, strict=True)]


def _join(pieces: Sequence[str], contents: Sequence[str]) -> str:
    return (
        "".join(part for pair in zip(pieces, contents, strict=False) for part in pair) + pieces[-1]
    )


def _spans(pieces: Sequence[str], contents: Sequence[str]) -> list[Span]:
    spans, at = [], 0
    for piece, content in zip(pieces, contents, strict=False):
        at += len(piece)
        spans.append((at, at + len(content)))
        at += len(content)
    return spans


def body_span(text: str, start: int, stop: int, content: str | None) -> Span | None:
    """An answer's own words inside start … stop: `content` verbatim behind white space, or stripped. None where they
    are other words. Without `content`: all but the white space in front.
    """
    region = text[start:stop]
    lead = len(region) - len(region.lstrip())
    if content is None:
        return start + min(lead, len(region)), stop
    if region.endswith(content) and not region[: len(region) - len(content)].strip():
        return stop - len(content), stop
    inner = content.strip()
    if region.strip() != inner:
        return None
    lead = lead if inner else 0
    return start + lead, start + lead + len(inner)
