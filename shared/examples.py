"""Chat examples as token ids for student and teacher, with the chunks that both share.

The student's sequence is prompt and response in turn, and EOS up to a whole block; those EOS are part of the last
response and carry loss (DESIGN §3). A teacher that shares the student's tokenizer reads that very sequence; another
teacher reads the conversation in its own template and tokens, and the chunks of the responses tie the two together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int

from shared.alignment import Chunks
from shared.config import LengthConfig
from shared.data.conversation import ChatExample
from shared.errors import Unusable
from shared.rendered import RenderedChat, Turns
from shared.responses import Side, align_responses
from shared.tokenizers import Tokenizer

NO_CHUNKS = np.zeros((0, 4), np.int32)
_IGNORED = "not written by a template: "


@dataclass(frozen=True)
class Prepared:
    """One example, ready for draws.

    `spans` are the maskable student positions (start, end; rising, apart). `teacher_ids` is None where the teacher
    reads the student's ids. `chunks` (teacher_start, teacher_end, student_start, student_end) lie wholly in responses
    of both; they are empty where `shared`: then student position i of span k is teacher position i + `offsets[k]`.
    """

    id: str
    student_ids: Int[np.ndarray, " length"]
    spans: Int[np.ndarray, "spans 2"]
    teacher_ids: Int[np.ndarray, " teacher_length"] | None
    chunks: Chunks
    shared: bool
    offsets: Int[np.ndarray, " spans"]
    label: str = ""

    @property
    def maskable(self) -> Int[np.ndarray, " maskable"]:
        """The maskable student positions, rising."""
        return positions_in(self.spans)

    def teacher_positions(self, masked: Int[np.ndarray, " masked"]) -> Int[np.ndarray, " masked"]:
        """Where a teacher that shares the tokenizer has these maskable student positions."""
        span = np.searchsorted(self.spans[:, 0], masked, side="right") - 1
        return (masked + self.offsets[span]).astype(np.int32)


def positions_in(spans: Int[np.ndarray, "spans 2"]) -> Int[np.ndarray, " positions"]:
    """Every position inside of `spans`."""
    parts = [np.arange(start, stop, dtype=np.int32) for start, stop in spans.tolist()]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


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

    `teacher` is a tokenizer of its own, a `SharedVocabulary`, or None where both read the very same ids. `counts` adds
    up what is lost in rows that are kept: `truncated`, `response_bytes`, `unaligned_bytes`, `unaligned_examples`.
    """

    student: Tokenizer
    teacher: Tokenizer | SharedVocabulary | None
    lengths: LengthConfig
    student_mask_id: int
    teacher_mask_id: int | None = None
    turns: Turns = "last"
    skip_first: bool = False
    """Position 0 of the teacher's sequence is never asked: a shifted teacher has no row that predicts it."""
    counts: Counter[str] = field(default_factory=Counter)

    def usable(self, examples: Sequence[ChatExample]) -> list[Prepared]:
        """Those of `examples` that can be used."""
        return [found for found in self(examples) if isinstance(found, Prepared)]

    def __call__(self, examples: Sequence[ChatExample]) -> list[Prepared | Unusable]:
        """Prepare `examples`; for one that cannot be used, the reason why."""
        student = _sides(self.student, examples, self.turns, self.counts)
        teacher: Sequence[Side | Unusable | None] = [None] * len(examples)
        if isinstance(self.teacher, Tokenizer):
            teacher = _sides(self.teacher, examples, self.turns, self.counts)
        return [self._try(e, s, t) for e, s, t in zip(examples, student, teacher, strict=True)]

    def _try(
        self, example: ChatExample, student: Side | Unusable, teacher: Side | Unusable | None
    ) -> Prepared | Unusable:
        for side in (student, teacher):
            if isinstance(side, Unusable):
                return side
        assert isinstance(student, Side) and not isinstance(teacher, Unusable)
        try:
            return self._one(example, student, teacher)
        except Unusable as reason:
            return reason

    def _one(self, example: ChatExample, student: Side, teacher: Side | None) -> Prepared:
        limit = self.lengths.student
        _refuse_mask(student, self.student_mask_id, self.student)
        if teacher is not None:
            assert isinstance(self.teacher, Tokenizer) and self.teacher_mask_id is not None
            _refuse_mask(teacher, self.teacher_mask_id, self.teacher)
            if teacher.starts[0] >= self.lengths.teacher:
                raise Unusable("prompt too long", f"the teacher's prompt has {teacher.starts[0]} tokens")
        if student.starts[0] >= limit:
            raise Unusable("prompt too long", f"the student's prompt has {student.starts[0]} tokens")
        ids, spans = student.ids, student.spans
        if len(ids) > limit:
            self.counts["truncated"] += 1
            ids = ids[:limit]
            spans = np.minimum(spans[spans[:, 0] < limit], limit).astype(np.int32)
        else:
            fill = self._fill(ids, spans)
            ids = np.concatenate([ids, np.full(fill, self.student.special_id("eos"), np.int32)])
            spans = spans.copy()
            spans[-1, 1] += fill
        if teacher is None:
            return self._shared(example, ids, spans)
        assert isinstance(self.teacher, Tokenizer)
        teacher_ids = teacher.ids[: self.lengths.teacher]
        chunks = align_responses(student, teacher, self.counts)
        inside = (chunks[:, 1] <= len(teacher_ids)) & (chunks[:, 3] <= len(ids))
        if self.skip_first:
            inside &= chunks[:, 0] > 0
        none = np.zeros(len(spans), np.int32)
        return Prepared(example.id, ids, spans, teacher_ids, chunks[inside], False, none, example.label)

    def _fill(self, ids: Int[np.ndarray, " length"], spans: Int[np.ndarray, "spans 2"]) -> int:
        """How many EOS follow: up to a whole block, or a block of them where there would be none at all."""
        block, fill = self.lengths.block, -len(ids) % self.lengths.block
        ended = fill > 0 or (ids[spans[-1, 0] :] == self.student.special_id("eos")).any()
        room = len(ids) + block <= self.lengths.student
        return fill if ended or not room or not self.lengths.end_block else block

    def _shared(
        self, example: ChatExample, ids: Int[np.ndarray, " length"], spans: Int[np.ndarray, "spans 2"]
    ) -> Prepared:
        """An example whose responses the teacher reads in the student's ids."""
        still = np.zeros(len(spans), np.int32)
        if self.teacher is None or (isinstance(self.teacher, SharedVocabulary) and self.teacher.holds(ids)):
            return Prepared(
                example.id,
                ids,
                self._asked(spans, still),
                None,
                NO_CHUNKS,
                shared=True,
                offsets=still,
                label=example.label,
            )
        assert isinstance(self.teacher, SharedVocabulary)
        if not self.teacher.holds(ids[positions_in(spans)]):
            raise Unusable("token that the teacher writes otherwise", "a response holds an unshared token")
        parts, at, length = [], 0, 0
        for k, (start, stop) in enumerate(spans.tolist()):
            prompt = self.teacher.translate(ids[at:start].tolist(), self.student)
            parts += [np.array(prompt, np.int32), ids[start:stop]]
            still[k] = length + len(prompt) - start
            length, at = length + len(prompt) + stop - start, stop
        rest = self.teacher.translate(ids[at:].tolist(), self.student)
        teacher_ids = np.concatenate([*parts, np.array(rest, np.int32)]).astype(np.int32)
        spans = self._asked(spans, still)
        return Prepared(example.id, ids, spans, teacher_ids, NO_CHUNKS, shared=True, offsets=still, label=example.label)

    def _asked(
        self, spans: Int[np.ndarray, "spans 2"], offsets: Int[np.ndarray, " spans"]
    ) -> Int[np.ndarray, "spans 2"]:
        """`spans` without the teacher's position 0, where it must not be asked."""
        if self.skip_first and spans[0, 0] + offsets[0] == 0:
            spans = spans.copy()
            spans[0, 0] += 1
        return spans


def _sides(
    tokenizer: Tokenizer, examples: Sequence[ChatExample], turns: Turns, counts: Counter[str]
) -> list[Side | Unusable]:
    """Each example as one tokenizer sees it."""
    chats: list[RenderedChat | Unusable] = []
    for example in examples:
        try:
            chats.append(tokenizer.render(example.messages, turns, example.tools))
        except Unusable as reason:
            chats.append(reason)
    encoded = iter(tokenizer.encode_chats([chat for chat in chats if isinstance(chat, RenderedChat)]))
    sides: list[Side | Unusable] = []
    for chat in chats:
        parts = chat if isinstance(chat, Unusable) else next(encoded)
        if isinstance(chat, Unusable) or isinstance(parts, Unusable):
            sides.append(chat if isinstance(chat, Unusable) else parts)  # type: ignore[arg-type]
        elif chat.turns[-1].body[0] == chat.turns[-1].body[1]:
            sides.append(Unusable("empty response", "the last answer is empty"))
        else:
            counts.update(f"{_IGNORED}{name}" for name in chat.ignored)
            sides.append(Side.of(chat, parts, tokenizer))
    return sides


def _refuse_mask(side: Side, mask_id: int, tokenizer: Tokenizer) -> None:
    if (side.ids == mask_id).any():
        name = f"the mask token of {tokenizer.name} ({tokenizer.decode([mask_id])!r})"
        raise Unusable("spells a mask token", f"the text holds {name}, which a model cannot tell from noise")
