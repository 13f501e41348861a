"""Texts that end a response, wherever it is asked for: of a benchmark's `until`, of a request's
`stop`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from student_train.using.load import LoadedStudent


@dataclass(frozen=True)
class Stops:
    """A stop that is a special token is found among the ids: a response's text has none of them."""

    student: LoadedStudent
    texts: tuple[str, ...]
    ids: frozenset[int]

    @classmethod
    def of(cls, student: LoadedStudent, stops: str | Sequence[str] | None) -> Stops:
        """Of one stop or several; empty ones count for nothing."""
        wanted = [stops] if isinstance(stops, str) else [stop for stop in stops or [] if stop]
        special = student.tokenizer.backend.get_added_vocab()
        ids = frozenset(int(special[stop]) for stop in wanted if stop in special)
        return cls(student, tuple(stop for stop in wanted if stop), ids)

    def cut(self, ids: Sequence[int]) -> tuple[str, bool]:
        """The text of `ids` up to where the first stop begins, and whether there is one.

        The first is the one that is complete first (of several that end together, the longest): so
        it is the same one whether the text is read as it grows or all at once, also where a stop
        lies within another.
        """
        ends = [i for i, token in enumerate(ids) if token in self.ids]
        text = self.student.text(ids[: ends[0]] if ends else ids)
        found = [(at + len(stop), at) for stop in self.texts if (at := text.find(stop)) >= 0]
        return text[: min(found)[1]] if found else text, bool(ends or found)

    def may_begin(self, text: str) -> int:
        """How many characters at the end of `text` may be the beginning of a stop."""
        longest = max(map(len, self.texts), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.texts):
                return size
        return 0
