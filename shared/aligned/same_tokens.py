"""Teachers of the student's tokenizer family: what they read, and which of their positions is which of the student's.

Such a teacher reads the student's sequence, or the conversation in its own template. It is asked at every maskable
position, or at the words of the answers alone (`targets.positions`, `targets.teacher_text`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from shared.aligned.responses import Side, align_responses
from shared.settings.config import LengthConfig
from shared.system.errors import Unusable
from shared.text.tokenizers import Tokenizer


@dataclass(frozen=True)
class SharedVocabulary:
    """A teacher of the student's tokenizer family: ids of which `same` is True mean the same to both.

    Vocabularies of one family differ in their added tokens (Qwen's from 151,646 on). In a prompt such a token is
    given to the teacher as the teacher would write its text; a response that holds one is left out and counted.
    """

    teacher: Tokenizer
    same: Bool[np.ndarray, " vocab"]

    @classmethod
    def between(cls, student: Tokenizer, teacher: Tokenizer) -> SharedVocabulary:
        """Compare the two vocabularies token by token."""
        a, b = student.token_bytes, teacher.token_bytes
        same = np.zeros(max(len(a), len(b)), bool)
        same[: min(len(a), len(b))] = [x == y and x != b"" for x, y in zip(a, b, strict=False)]
        return cls(teacher, same)

    def holds(self, ids: Int[np.ndarray, " length"]) -> bool:
        """Whether all of `ids` are shared."""
        return bool(self.same[ids].all())

    def translate(self, ids: Sequence[int], student: Tokenizer) -> list[int]:
        """`ids` for the teacher: shared ones as they are, others as the teacher tokenises their text."""
        result: list[int] = []
        for token in ids:
            if self.same[token]:
                result.append(token)
            else:
                result += self.teacher.encode(
                    [student.token_bytes[token].decode("utf-8", "replace")]
                )[0]
        return result


@dataclass(frozen=True)
class Reading:
    """What a teacher of the student's tokens reads: None, the student's ids; and where it is asked.

    `pairs`: the positions, student's and teacher's, rising; None: all maskable ones of the student's, at position
    i + `offsets[k]` of span k.
    """

    ids: Int[np.ndarray, " teacher_length"] | None
    pairs: Int[np.ndarray, "asked 2"] | None
    offsets: Int[np.ndarray, " spans"]


def positions_in(spans: Int[np.ndarray, "spans 2"]) -> Int[np.ndarray, " positions"]:
    """Every position inside of `spans`."""
    parts = [np.arange(start, stop, dtype=np.int32) for start, stop in spans.tolist()]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def read_student_text(
    ids: Int[np.ndarray, " length"],
    spans: Int[np.ndarray, "spans 2"],
    student: Tokenizer,
    shared: SharedVocabulary | None,
    limit: int,
    words: Int[np.ndarray, " words"] | None,
) -> Reading:
    """The student's sequence, up to `limit` tokens of it; asked at the positions `words`, or (None) all of `spans`.

    Unusable where a response holds a token that is not shared.
    """
    teacher_ids, offsets = None, np.zeros(len(spans), np.int32)
    if shared is not None and not shared.holds(ids):
        if not shared.holds(ids[positions_in(spans)]):
            raise Unusable(
                "token that the teacher writes otherwise", "a response holds an unshared token"
            )
        parts, at, length = [], 0, 0
        for k, (start, stop) in enumerate(spans.tolist()):
            prompt = shared.translate(ids[at:start].tolist(), student)
            parts += [np.array(prompt, np.int32), ids[start:stop]]
            offsets[k] = length + len(prompt) - start
            length, at = length + len(prompt) + stop - start, stop
        rest = shared.translate(ids[at:].tolist(), student)
        teacher_ids = np.concatenate([*parts, np.array(rest, np.int32)]).astype(np.int32)
    too_long = len(ids if teacher_ids is None else teacher_ids) > limit
    if words is None and not too_long:
        return Reading(teacher_ids, None, offsets)
    asked = positions_in(spans) if words is None else words
    pairs = np.stack([asked, asked + offsets[spans_of(spans, asked)]], axis=1).astype(np.int32)
    if too_long:
        teacher_ids = (ids if teacher_ids is None else teacher_ids)[:limit]
        pairs = pairs[pairs[:, 1] < limit]
    return Reading(teacher_ids, pairs, offsets)


def read_own_text(
    student: Side, teacher: Side, length: int, lengths: LengthConfig, counts: Counter[str]
) -> Reading:
    """The conversation in the teacher's own template, EOS up to a whole block behind it, clean as in TIDE's reference;
    asked at those words of the answers that the student's `length` tokens have.
    """
    eos = np.full(-len(teacher.ids) % lengths.block, teacher.tokenizer.special_id("eos"), np.int32)
    teacher_ids = np.concatenate([teacher.ids, eos])[: lengths.teacher]
    chunks = align_responses(student, teacher, counts)
    chunks = chunks[(chunks[:, 1] <= len(teacher_ids)) & (chunks[:, 3] <= length)]
    single = (chunks[:, 1] - chunks[:, 0] == 1) & (chunks[:, 3] - chunks[:, 2] == 1)
    pairs = chunks[single][:, [2, 0]]
    same = student.ids[pairs[:, 0]] == teacher.ids[pairs[:, 1]]
    return Reading(teacher_ids, pairs[same], np.zeros(len(student.spans), np.int32))


def words_in(student: Side, length: int) -> Int[np.ndarray, " words"]:
    """Positions below `length` of tokens that hold nothing but the words of an answer."""
    spans = align_responses(student, student, Counter())[:, 2:]
    words = positions_in(spans)
    return words[words < length]


def spans_of(
    spans: Int[np.ndarray, "spans 2"], positions: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """The number of the span that each position lies in."""
    return np.searchsorted(spans[:, 0], positions, side="right") - 1
