"""Chat examples as token ids for student and teacher, with the chunks that both share.

The student's sequence is prompt and response in turn, and EOS up to a whole block; those EOS are part of the last
response and carry loss (DESIGN §3). A teacher that shares the student's tokenizer reads that very sequence; another
teacher reads the conversation in its own template and tokens, and the chunks of the responses tie the two together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Int

from shared.aligned.alignment import Chunks
from shared.aligned.responses import Side, align_responses
from shared.aligned.same_tokens import (
    SharedVocabulary,
    positions_in,
    read_own_text,
    read_student_text,
    spans_of,
    words_in,
)
from shared.data.conversation import ChatExample
from shared.settings.config import LengthConfig
from shared.system.errors import Unusable
from shared.text.rendered import RenderedChat, Turns
from shared.text.tokenizers import Tokenizer

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
    pairs: Int[np.ndarray, "asked 2"] | None = None
    """Where `shared`: the positions, student's and teacher's, at which the teacher may be asked, rising; None: all
    maskable ones, by `offsets`.
    """

    @property
    def maskable(self) -> Int[np.ndarray, " maskable"]:
        """The maskable student positions, rising."""
        return positions_in(self.spans)

    def asked(
        self, masked: Int[np.ndarray, " masked"]
    ) -> tuple[Int[np.ndarray, " read"], Int[np.ndarray, " read"]]:
        """Which of these masked positions (by number) a teacher of the same tokenizer is asked about, and where it has
        them.
        """
        if self.pairs is None:
            every = np.arange(masked.size)
            return every, (masked + self.offsets[spans_of(self.spans, masked)]).astype(np.int32)
        _, which, pair = np.intersect1d(
            masked, self.pairs[:, 0], assume_unique=True, return_indices=True
        )
        return which, self.pairs[pair, 1].astype(np.int32)


@dataclass
class Preparer:
    """Turns chat examples into `Prepared` ones.

    `teacher` is a tokenizer of its own, a `SharedVocabulary`, or None where both read the very same ids. `counts` adds
    up what is lost in rows that are kept: `truncated`, `beyond_teacher`, `response_bytes`, `unaligned_bytes`,
    `unaligned_examples`.
    """

    student: Tokenizer
    teacher: Tokenizer | SharedVocabulary | None
    lengths: LengthConfig
    student_mask_id: int
    teacher_mask_id: int | None = None
    turns: Turns = "last"
    positions: Literal["content", "response"] = "response"
    """With a shared tokenizer: where the teacher is asked (`TargetConfig.positions`)."""
    own_text: bool = False
    """With a shared tokenizer: the teacher reads its own template (`TargetConfig.teacher_text`)."""
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
        elif isinstance(self.teacher, SharedVocabulary) and self.own_text:
            teacher = _sides(self.teacher.teacher, examples, self.turns, self.counts)
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
            assert self.teacher_mask_id is not None
            _refuse_mask(teacher, self.teacher_mask_id, teacher.tokenizer)
        if student.starts[0] >= limit:
            raise Unusable(
                "prompt too long", f"the student's prompt has {student.starts[0]} tokens"
            )
        ids, spans, whole = student.ids, student.spans, len(student.ids) <= limit
        if not whole:
            self.counts["truncated"] += 1
            ids = ids[:limit]
            spans = np.minimum(spans[spans[:, 0] < limit], limit).astype(np.int32)
        else:
            fill = self._fill(ids, spans)
            ids = np.concatenate([ids, np.full(fill, self.student.special_id("eos"), np.int32)])
            spans = spans.copy()
            spans[-1, 1] += fill
        if not isinstance(self.teacher, Tokenizer):
            return self._same_tokens(example, student, teacher, ids, spans)
        assert teacher is not None
        chunks = align_responses(student, teacher, self.counts)
        inside = (chunks[:, 1] <= self.lengths.teacher) & (chunks[:, 3] <= len(ids))
        if self.skip_first:
            inside &= chunks[:, 0] > 0
        chunks = chunks[inside]
        self._count_unread(teacher)
        # What the student does not have, the teacher does not read: it would tell what comes before it.
        end = 0 if not len(chunks) else self.lengths.teacher if whole else int(chunks[-1, 1])
        none = np.zeros(len(spans), np.int32)
        return Prepared(
            example.id, ids, spans, teacher.ids[:end], chunks, False, none, example.label
        )

    def _count_unread(self, teacher: Side) -> None:
        """An example whose prompt alone is longer than the teacher may read is trained by cross-entropy alone."""
        self.counts["beyond_teacher"] += teacher.starts[0] >= self.lengths.teacher

    def _fill(self, ids: Int[np.ndarray, " length"], spans: Int[np.ndarray, "spans 2"]) -> int:
        """How many EOS follow: up to a whole block, or a block of them where there would be none at all."""
        block, fill = self.lengths.block, -len(ids) % self.lengths.block
        ended = fill > 0 or (ids[spans[-1, 0] :] == self.student.special_id("eos")).any()
        room = len(ids) + block <= self.lengths.student
        return fill if ended or not room or not self.lengths.end_block else block

    def _same_tokens(
        self,
        example: ChatExample,
        student: Side,
        teacher: Side | None,
        ids: Int[np.ndarray, " length"],
        spans: Int[np.ndarray, "spans 2"],
    ) -> Prepared:
        """An example whose answers the teacher reads in the student's tokens."""
        if teacher is not None:
            self._count_unread(teacher)
            found = read_own_text(student, teacher, len(ids), self.lengths, self.counts)
        else:
            assert not isinstance(self.teacher, Tokenizer)
            words = words_in(student, len(ids)) if self.positions == "content" else None
            found = read_student_text(
                ids, spans, self.student, self.teacher, self.lengths.teacher, words
            )
        pairs = found.pairs
        if self.skip_first and pairs is not None:
            pairs = pairs[pairs[:, 1] > 0]
        elif self.skip_first and spans[0, 0] + found.offsets[0] == 0:
            spans = spans.copy()
            spans[0, 0] += 1
        return Prepared(
            example.id, ids, spans, found.ids, NO_CHUNKS, True, found.offsets, example.label, pairs
        )


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
    encoded = iter(
        tokenizer.encode_chats([chat for chat in chats if isinstance(chat, RenderedChat)])
    )
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
        raise Unusable(
            "spells a mask token", f"the text holds {name}, which a model cannot tell from noise"
        )
