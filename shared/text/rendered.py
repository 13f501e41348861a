"""A chat as text, with the places of all that matters in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from shared.text.located import Span

Message = Mapping[str, Any]
Turns = Literal["last", "all"]

EXTRAS = ("tool_calls", "reasoning_content")
"""Parts of an answer beside its content."""


@dataclass(frozen=True)
class Turn:
    """A response that is trained, in characters of the text: it goes from `start` to `end`, its end of turn included;
    its own words, without white space and marks of the template around them, are `body`.
    """

    message: int
    start: int
    end: int
    body: Span


@dataclass(frozen=True)
class RenderedChat:
    """A chat as text. What stands outside of `turns` is prompt (no loss).

    `contents[i]` is the span of message i's content, or None where the template altered it. `plain`: all spans of
    contents, altered or not; None where they could not be told from the template's own text: then `unplaced` has them.
    """

    text: str
    turns: tuple[Turn, ...]
    contents: tuple[Span | None, ...]
    plain: tuple[Span, ...] | None
    unplaced: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    """What the conversation has and the template does not write: tools, parts of earlier answers."""

    @property
    def response_start(self) -> int:
        """Where the last response begins."""
        return self.turns[-1].start


@dataclass(frozen=True)
class Probe:
    """What a template makes of a sequence of roles: the fixed text around the contents (`pieces`), and how much of the
    piece before each answer belongs to the answer (`leads`; None where the prompt of inference is no prefix). The last
    piece is `closing` and what a template appends behind it.
    """

    pieces: list[str]
    closing: str
    leads: dict[int, int | None] = field(default_factory=dict)
