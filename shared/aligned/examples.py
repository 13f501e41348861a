"""Chat examples as token ids for student and teacher, with the chunks that both share.

The student's sequence is prompt and response in turn, and EOS up to a whole block; those EOS are
part of the last response and carry loss. A teacher that shares the student's tokenizer reads that
very sequence (or the conversation in its own template); another teacher reads the conversation in
its own template and tokens, and the chunks of the responses tie the two together.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from shared.aligned.alignment import Chunks, Side, align_responses
from shared.aligned.sides import STUDENT, TEACHER, refuse_other_words, sides_of
from shared.data.conversation import ChatExample
from shared.settings.config import LengthConfig
from shared.system.files import Unusable
from shared.text.templates import Turns
from shared.text.tokenizers import Tokenizer


@dataclass(frozen=True)
class Prepared:
    """One example, ready for draws.

    `spans` are the maskable student positions (start, end; rising, apart). `teacher_ids` is None
    where the teacher reads the student's ids. `chunks` (teacher_start, teacher_end, student_start,
    student_end) lie wholly in responses of both; they are empty where `shared`.

    Where `shared`, `pairs` are the positions, student's and teacher's, at which the teacher may be
    asked, rising; None: all maskable ones, position i of span k at i + `offsets[k]`.
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

    @property
    def maskable(self) -> Int[np.ndarray, " maskable"]:
        """The maskable student positions, rising."""
        return _positions_in(self.spans)

    def asked(
        self, masked: Int[np.ndarray, " masked"]
    ) -> tuple[Int[np.ndarray, " read"], Int[np.ndarray, " read"]]:
        """Which of these masked positions (by number) a teacher of the same tokenizer is asked
        about, and where it has them.
        """
        if self.pairs is None:
            places = masked + _offset_at(masked, self.spans, self.offsets)
            return np.arange(masked.size), places.astype(np.int32)
        _, which, pair = np.intersect1d(
            masked, self.pairs[:, 0], assume_unique=True, return_indices=True
        )
        return which, self.pairs[pair, 1].astype(np.int32)


@dataclass(frozen=True)
class SharedVocabulary:
    """A teacher of the student's tokenizer family: ids where `same` is True mean the same to both.

    Vocabularies of one family differ in their added tokens (Qwen's from 151,646 on). In a prompt
    such a token is given to the teacher as the teacher would write its text; a response that holds
    one is left out and counted.
    """

    teacher: Tokenizer
    same: Bool[np.ndarray, " vocab"]

    @classmethod
    def between(cls, student: Tokenizer, teacher: Tokenizer) -> "SharedVocabulary":
        """Compare the two vocabularies token by token."""
        same = [a == b != b"" for a, b in zip_longest(student.token_bytes, teacher.token_bytes)]
        return cls(teacher, np.array(same))

    def translate(self, ids: Int[np.ndarray, " n"], student: Tokenizer) -> list[int]:
        """`ids` for the teacher: shared ones as they are, others as it tokenises their text."""
        result: list[int] = []
        for token in ids.tolist():
            text = student.token_bytes[token].decode("utf-8", "replace")
            result += [token] if self.same[token] else self.teacher.encode([text])[0]
        return result


@dataclass
class Preparer:
    """Turns chat examples into `Prepared` ones.

    `teacher` is a tokenizer of its own, a `SharedVocabulary`, or None where both read the very same
    ids. With a shared tokenizer, `positions` says where the teacher is asked: at all of a response,
    or at the answer's own words (`targets.positions`); `own_text`, that it reads its own template
    (`targets.teacher_text`). `skip_first`: position 0 of the teacher's sequence is never asked,
    since a shifted teacher has no row that predicts it.

    `counts` adds up what is lost in rows that are kept: `truncated`, `beyond_teacher` (the prompt
    alone is longer than the teacher may read: cross-entropy only), `response_bytes`,
    `unaligned_bytes`, `unaligned_examples`.
    """

    student: Tokenizer
    teacher: Tokenizer | SharedVocabulary | None
    lengths: LengthConfig
    student_mask_id: int
    teacher_mask_id: int | None = None
    turns: Turns = "last"
    positions: Literal["content", "response"] = "response"
    own_text: bool = False
    skip_first: bool = False
    counts: Counter[str] = field(default_factory=Counter)

    def usable(self, examples: Sequence[ChatExample]) -> list[Prepared]:
        """Those of `examples` that can be used."""
        return [result for result in self(examples) if isinstance(result, Prepared)]

    def __call__(self, examples: Sequence[ChatExample]) -> list[Prepared | Unusable]:
        """Prepare `examples`; for one that cannot be used, the reason why."""
        reader: Tokenizer | None = None  # of the teacher's own text, if it reads any
        if isinstance(self.teacher, Tokenizer):
            reader = self.teacher
        elif isinstance(self.teacher, SharedVocabulary) and self.own_text:
            reader = self.teacher.teacher
        more = (self.turns, self.counts)
        students = sides_of(examples, STUDENT, self.student, self.student_mask_id, *more)
        teachers: Sequence[Side | Unusable | None] = [None] * len(examples)
        if reader is not None:
            assert self.teacher_mask_id is not None
            teachers = sides_of(examples, TEACHER, reader, self.teacher_mask_id, *more)
        results: list[Prepared | Unusable] = []
        for example, student, teacher in zip(examples, students, teachers, strict=True):
            if isinstance(student, Unusable):
                results.append(student)
            elif isinstance(teacher, Unusable):
                results.append(teacher)
            else:
                try:
                    results.append(self._prepare(example, student, teacher))
                except Unusable as reason:
                    results.append(reason)
        return results

    def _prepare(self, example: ChatExample, student: Side, teacher: Side | None) -> Prepared:
        """One example out of what either side sees. Unusable where it cannot be trained."""
        # 1. The student's sequence: cut at its length, or filled with EOS behind the last response,
        #    up to a whole block; one block more where there would be none at all.
        limit, block, eos = self.lengths.student, self.lengths.block, self.student.special_id("eos")
        ids, spans = student.ids, student.spans.copy()
        cut = False
        if example.tokens is not None:
            cut = example.tokens[STUDENT].cut  # before it came here: no end belongs behind it
            limit = min(limit, len(ids) // block * block) if cut else limit
            if teacher is not None:
                refuse_other_words(student, teacher)
        if spans[0, 0] >= limit:
            raise Unusable("prompt too long", f"the student's prompt has {spans[0, 0]} tokens")
        whole = len(ids) <= limit and not cut
        if whole:
            fill = -len(ids) % block
            ended = fill > 0 or eos in ids[spans[-1, 0] :] or not self.lengths.end_block
            if not ended and len(ids) + block <= limit:
                fill = block
            ids = np.concatenate([ids, np.full(fill, eos, np.int32)])
            spans[-1, 1] += fill
        else:
            self.counts["truncated"] += 1
            ids = ids[:limit]
            spans = np.minimum(spans[spans[:, 0] < limit], limit)
        # 2. What the teacher reads, and where it is asked.
        if teacher is not None:
            self.counts["beyond_teacher"] += int(teacher.spans[0, 0]) >= self.lengths.teacher
        shared = not isinstance(self.teacher, Tokenizer)
        offsets, pairs = np.zeros(len(spans), np.int32), None
        chunks = np.zeros((0, 4), np.int32)
        if teacher is None:
            teacher_ids, offsets, pairs = self._read_student_text(student, ids, spans)
        elif shared:
            teacher_ids, pairs = self._read_own_text(student, teacher, len(ids))
        else:
            # Another tokenizer: its own text, and the chunks inside of both lengths.
            most = self.lengths.teacher
            chunks = align_responses(student, teacher, self.counts)
            inside = (chunks[:, 1] <= most) & (chunks[:, 3] <= len(ids))
            if self.skip_first:
                inside &= chunks[:, 0] > 0
            chunks = chunks[inside]
            # What the student does not have, it does not read: that would tell what comes first.
            end = 0
            if len(chunks):
                end = most if whole else chunks[-1, 1]
            teacher_ids = teacher.ids[:end]
        # 3. A shifted teacher predicts no first position.
        if self.skip_first and pairs is not None:
            pairs = pairs[pairs[:, 1] > 0]
        elif self.skip_first and shared and spans[0, 0] + offsets[0] == 0:
            spans[0, 0] += 1
        return Prepared(
            example.id, ids, spans, teacher_ids, chunks, shared, offsets, example.label, pairs
        )

    def _read_own_text(
        self, student: Side, teacher: Side, length: int
    ) -> tuple[Int[np.ndarray, " teacher_length"], Int[np.ndarray, "asked 2"]]:
        """A teacher of the same tokens that reads its own template, EOS up to a whole block behind
        it, clean as in TIDE's reference; asked at those words of the answers that the student has.
        """
        eos = teacher.tokenizer.special_id("eos")
        fill = np.full(-len(teacher.ids) % self.lengths.block, eos, np.int32)
        teacher_ids = np.concatenate([teacher.ids, fill])[: self.lengths.teacher]
        chunks = align_responses(student, teacher, self.counts)
        chunks = chunks[(chunks[:, 1] <= len(teacher_ids)) & (chunks[:, 3] <= length)]
        # Chunks of one token on either side, and the same one.
        single = (chunks[:, 1] - chunks[:, 0] == 1) & (chunks[:, 3] - chunks[:, 2] == 1)
        pairs = chunks[single][:, [2, 0]]
        same = student.ids[pairs[:, 0]] == teacher.ids[pairs[:, 1]]
        return teacher_ids, pairs[same]

    def _read_student_text(
        self, student: Side, ids: Int[np.ndarray, " length"], spans: Int[np.ndarray, "spans 2"]
    ) -> tuple[
        Int[np.ndarray, " teacher_length"] | None,
        Int[np.ndarray, " spans"],
        Int[np.ndarray, "asked 2"] | None,
    ]:
        """A teacher of the same tokens that reads the student's sequence `ids`: its own ids where
        they are others, each span's offset, and the pairs where not all of `spans` is asked.
        """
        # 1. Tokens that are not shared: in a prompt they are translated, which moves what follows.
        teacher_ids, offsets = None, np.zeros(len(spans), np.int32)
        shared, maskable = self.teacher, _positions_in(spans)
        assert not isinstance(shared, Tokenizer)
        if shared is not None and not shared.same[ids].all():
            if not shared.same[ids[maskable]].all():
                reason = "a response holds an unshared token"
                raise Unusable("token that the teacher writes otherwise", reason)
            translated: list[int] = []
            at = 0
            for k, (start, stop) in enumerate(spans.tolist()):
                translated += shared.translate(ids[at:start], self.student)
                offsets[k] = len(translated) - start
                translated += ids[start:stop].tolist()
                at = stop
            translated += shared.translate(ids[at:], self.student)
            teacher_ids = np.array(translated, np.int32)
        # 2. Where it is asked (everywhere, or at tokens that hold nothing but an answer's words),
        #    and what it may read.
        limit, whole = self.lengths.teacher, ids if teacher_ids is None else teacher_ids
        words = maskable
        if self.positions == "content":
            words = _positions_in(align_responses(student, student, Counter())[:, 2:])
            words = words[words < len(ids)]
        elif len(whole) <= limit:
            return teacher_ids, offsets, None
        places = words + _offset_at(words, spans, offsets)
        pairs = np.stack([words, places], axis=1).astype(np.int32)[places < limit]
        return whole[:limit] if len(whole) > limit else teacher_ids, offsets, pairs


def _positions_in(spans: Int[np.ndarray, "spans 2"]) -> Int[np.ndarray, " positions"]:
    """Every position inside of `spans`."""
    parts = [np.arange(start, stop, dtype=np.int32) for start, stop in spans.tolist()]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _offset_at(
    positions: Int[np.ndarray, " n"],
    spans: Int[np.ndarray, "spans 2"],
    offsets: Int[np.ndarray, " spans"],
) -> Int[np.ndarray, " n"]:
    """The offset of the span that each position lies in."""
    return offsets[np.searchsorted(spans[:, 0], positions, side="right") - 1]
