"""One response as its blocks settle: what of its text can be sent, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from student_train.using.sampler import until_eos
from student_train.using.stops import Stops

Reason = Literal["stop", "length"]
_HALF = "\ufffd"
"""What a character decodes to whose bytes are not all there."""


@dataclass(frozen=True)
class Piece:
    """More text of a response; `reason` where it is the last. `tokens` are those of the response so far."""

    text: str
    tokens: int
    reason: Reason | None = None


class Answer:
    """Text of at most `limit` tokens; what may be a stop's beginning, or half a character, waits for the next block."""

    def __init__(self, stops: Stops, limit: int) -> None:
        self._stops, self._limit, self._sent = stops, limit, 0

    def read(self, made: Sequence[int]) -> Piece:
        """What is new in a response whose finished blocks are `made`."""
        whole = until_eos(list(made), self._stops.student.special.eos)
        kept = whole[: self._limit]
        text, stopped = self._stops.cut(kept)
        reason: Reason | None = None
        if stopped or (len(whole) < len(made) and len(whole) <= self._limit):
            reason = "stop"
        elif len(made) >= self._limit:
            reason = "length"
        if reason is None:
            text = text.rstrip(_HALF)
            text = text[: len(text) - self._stops.may_begin(text)]
        more, self._sent = text[self._sent :], max(self._sent, len(text))
        return Piece(more, len(kept), reason)
