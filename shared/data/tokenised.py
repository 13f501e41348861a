"""Rows whose conversation is token ids already: TIDE's reference publishes its data so.

`align_student` and `align_teacher`, or `ranges`, say where the answers' own words stand.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.system.files import Unusable


@dataclass(frozen=True)
class Tokens:
    """A conversation in the tokens of one side. What is trained begins at `response`; the answer's
    own words stand from `start` to `end`.
    """

    ids: tuple[int, ...]
    response: int
    start: int
    end: int

    @property
    def cut(self) -> bool:
        """Whether the answer was cut short: the template would write an end behind its words."""
        return self.end >= len(self.ids)


def tokens_of(row: Mapping[str, Any]) -> tuple[Tokens, Tokens]:
    """The student's side and the teacher's. Unusable where the columns do not fit each other."""
    student, teacher = _numbers(row, "input_ids"), _numbers(row, "teacher_input_ids")
    labels = _numbers(row, "labels", lowest=-100)
    response = next((i for i, label in enumerate(labels) if label >= 0), len(labels))
    if len(labels) != len(student) or response == len(labels):
        reason = f"{len(student)} input_ids have {len(labels)} labels, of which none may be trained"
        raise Unusable("not in its form", reason)
    # The last message is the one that is trained. Its range may reach over what was cut off.
    ranges = row.get("ranges")
    if isinstance(ranges, list | tuple) and ranges:
        last = _numbers({"ranges": ranges[-1]}, "ranges")
        edges = last if len(last) == 4 else (0, 0, 0, 0)
    else:
        places = zip(_numbers(row, "align_teacher"), _numbers(row, "align_student"), strict=False)
        words = [(t, s) for t, s in places if s >= response] or [(0, 0)]
        edges = (words[0][0], words[-1][0] + 1, words[0][1], words[-1][1] + 1)
    start, end = edges[2], min(edges[3], len(student))
    if not response <= start < end or not edges[0] < edges[1] <= len(teacher):
        raise Unusable("no answer", "the words of the trained answer are in none of its places")
    return Tokens(student, response, start, end), Tokens(teacher, edges[0], *edges[:2])


def _numbers(row: Mapping[str, Any], name: str, lowest: int = 0) -> tuple[int, ...]:
    values = row.get(name)
    if not isinstance(values, list | tuple):
        kind = type(values).__name__
        raise Unusable("not in its form", f"`{name}` is a {kind}, not a list of whole numbers")
    if not all(type(value) is int and lowest <= value < 2**31 for value in values):
        raise Unusable("not in its form", f"`{name}` holds what is no place and no token")
    return tuple(values)
