"""Chat examples as token ids for student and teacher, with the chunks that both share.

The student's sequence is prompt, response, and EOS up to a whole block; those EOS are part of the response and
carry loss (DESIGN §3). A teacher that shares the student's tokenizer reads that very sequence; another teacher
reads the conversation in its own template and tokens, and the chunks of the response tie the two together.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int

from shared.alignment import Chunks, Region, align_tokens, common_prefix
from shared.config import LengthConfig
from shared.data import ChatExample
from shared.errors import TideError
from shared.tokenizers import Tokenizer


@dataclass(frozen=True)
class Prepared:
    """One example, ready for draws.

    `student_ids[prompt_length:]` are maskable. `teacher_ids` is None where the teacher reads the student's ids.
    `chunks` (teacher_start, teacher_end, student_start, student_end) lie wholly in both responses; they are empty
    where `shared`: then student position i of the response is teacher position i + `offset`.
    """

    id: str
    student_ids: Int[np.ndarray, " length"]
    prompt_length: int
    teacher_ids: Int[np.ndarray, " teacher_length"] | None
    chunks: Chunks
    shared: bool = False
    offset: int = 0


@dataclass
class PrepareCounts:
    """What preparation left out, for the manifest and the report."""

    examples: int = 0
    dropped_long_prompt: int = 0
    dropped_unshared: int = 0
    truncated: int = 0
    unaligned_examples: int = 0
    unaligned_bytes: int = 0
    response_bytes: int = 0


@dataclass(frozen=True)
class _Side:
    """One tokenizer's view of one conversation."""

    prompt: list[int]
    response: list[int]
    content: str


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
                result += self.teacher.encode([student.token_bytes[token].decode("utf-8", "replace")])[0]
        return result


@dataclass
class Preparer:
    """Turns chat examples into `Prepared` ones.

    `teacher` is a tokenizer of its own, a `SharedVocabulary`, or None where both read the very same ids.
    """

    student: Tokenizer
    teacher: Tokenizer | SharedVocabulary | None
    lengths: LengthConfig
    student_mask_id: int
    teacher_mask_id: int | None = None
    counts: PrepareCounts = field(default_factory=PrepareCounts)

    def __call__(self, examples: Sequence[ChatExample]) -> list[Prepared]:
        """Prepare `examples`; those whose prompt fills the length are dropped and counted.

        Raises TideError where the text contains a mask token: the model could not tell it from noise.
        """
        student = _tokenise(self.student, examples)
        teacher: Sequence[_Side | None] = [None] * len(examples)
        if isinstance(self.teacher, Tokenizer):
            teacher = _tokenise(self.teacher, examples)
        prepared = (self._one(e, s, t) for e, s, t in zip(examples, student, teacher, strict=True))
        return [p for p in prepared if p is not None]

    def _one(self, example: ChatExample, student: _Side, teacher: _Side | None) -> Prepared | None:
        self.counts.examples += 1
        limit = self.lengths.student
        _refuse_mask(example, student, self.student_mask_id, self.student)
        too_long = len(student.prompt) >= limit
        if teacher is not None:
            assert isinstance(self.teacher, Tokenizer) and self.teacher_mask_id is not None
            _refuse_mask(example, teacher, self.teacher_mask_id, self.teacher)
            too_long = too_long or len(teacher.prompt) >= self.lengths.teacher
        if too_long:
            self.counts.dropped_long_prompt += 1
            return None
        ids = student.prompt + student.response
        if len(ids) > limit:
            self.counts.truncated += 1
            ids = ids[:limit]
        else:
            ids = ids + [self.student.special_id("eos")] * (-len(ids) % self.lengths.block)
        if teacher is None:
            return self._shared(example, student, np.array(ids, np.int32))
        teacher_ids = np.array((teacher.prompt + teacher.response)[: self.lengths.teacher], np.int32)
        chunks = self._align(student, teacher)
        inside = (chunks[:, 1] <= len(teacher_ids)) & (chunks[:, 3] <= len(ids))
        return Prepared(example.id, np.array(ids, np.int32), len(student.prompt), teacher_ids, chunks[inside])

    def _shared(self, example: ChatExample, student: _Side, ids: Int[np.ndarray, " length"]) -> Prepared | None:
        """An example whose response the teacher reads in the student's ids."""
        start, none = len(student.prompt), np.zeros((0, 4), np.int32)
        if self.teacher is None or (isinstance(self.teacher, SharedVocabulary) and self.teacher.holds(ids)):
            return Prepared(example.id, ids, start, None, none, shared=True)
        assert isinstance(self.teacher, SharedVocabulary)
        if not self.teacher.holds(ids[start:]):
            self.counts.dropped_unshared += 1
            return None
        prompt = np.array(self.teacher.translate(student.prompt, self.student), np.int32)
        teacher_ids = np.concatenate([prompt, ids[start:]])
        return Prepared(example.id, ids, start, teacher_ids, none, shared=True, offset=len(prompt) - start)

    def _align(self, student: _Side, teacher: _Side) -> Chunks:
        """Chunks of the response, in positions of the whole sequences.

        A tokenizer may normalise its text (Qwen's applies NFC). Then the chunks cover the bytes up to the first
        change; what is lost is counted. Where both normalise alike, nothing is.
        """
        assert isinstance(self.teacher, Tokenizer)
        if student.content != teacher.content:  # one template altered the content, say by stripping it
            shared = common_prefix(student.content.encode(), teacher.content.encode())
        else:
            shared = len(student.content.encode())
        s_bytes = b"".join(map(self.student.token_bytes.__getitem__, student.response))
        t_bytes = b"".join(map(self.teacher.token_bytes.__getitem__, teacher.response))
        text = student.content.encode()[:shared]
        length, whole = _common_length(s_bytes, t_bytes, text), len(text)
        if length < whole:
            composed = unicodedata.normalize("NFC", student.content).encode()
            other = _common_length(s_bytes, t_bytes, composed)
            if other > length:
                length, whole = other, len(composed)
        self.counts.response_bytes += whole
        self.counts.unaligned_bytes += whole - length
        self.counts.unaligned_examples += length < whole
        chunks = align_tokens(
            self.teacher.byte_lengths[teacher.response],
            self.student.byte_lengths[student.response],
            [Region(0, 0, length)],
        )
        shift = np.array([len(teacher.prompt)] * 2 + [len(student.prompt)] * 2, np.int32)
        return chunks + shift


def _common_length(a: bytes, b: bytes, text: bytes) -> int:
    """How many bytes of `text` both `a` and `b` start with."""
    if a.startswith(text) and b.startswith(text):
        return len(text)
    return min(common_prefix(a, text), common_prefix(b, text))


def _tokenise(tokenizer: Tokenizer, examples: Sequence[ChatExample]) -> list[_Side]:
    """Prompt and response are tokenised apart, as at inference: no token reaches over their border."""
    chats = [tokenizer.render(example.messages) for example in examples]
    ids = tokenizer.encode([t for c in chats for t in (c.text[: c.response_start], c.text[c.response_start :])])
    sides = []
    for chat, prompt, response in zip(chats, ids[0::2], ids[1::2], strict=True):
        span = chat.contents[-1]
        assert span is not None  # `render` always locates the response
        sides.append(_Side(prompt, response, chat.text[slice(*span)]))
    return sides


def _refuse_mask(example: ChatExample, side: _Side, mask_id: int, tokenizer: Tokenizer) -> None:
    if mask_id in side.prompt or mask_id in side.response:
        raise TideError(
            f"example {example.id} contains the mask token of {tokenizer.name} ({tokenizer.decode([mask_id])!r})",
            expected="text without mask tokens: the model cannot tell them from noise",
            fix="remove the example from the data, or escape the token in its text",
        )
