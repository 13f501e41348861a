"""Several trained answers in one row: spans, masks, chunks and teacher positions hold for all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from shared.aligned.examples import Prepared, Preparer, SharedVocabulary
from shared.data import ChatExample
from shared.diffusion import chunk_draw
from shared.settings.config import LengthConfig
from shared.text.tokenizers import Tokenizer
from tests.shared.aligned.test_examples import STUDENT, TEACHER, bytes_of
from tests.shared.text.test_templates import chat

LENGTHS = LengthConfig(student=128, teacher=256, block=32)
ANSWERS = ["x = 1 + 2", "def f():\n    return 3", "done"]
CHAT = ChatExample("e", tuple(chat("first", ANSWERS[0], "second", ANSWERS[1], "third", ANSWERS[2])))


def one(
    teacher: Any = TEACHER, turns: Any = "all", lengths: Any = LENGTHS, student: Any = STUDENT
) -> Prepared:
    mask = TEACHER.special_id("mask") if isinstance(teacher, Tokenizer) else None
    preparer = Preparer(student, teacher, lengths, student.special_id("mask"), mask, turns)
    (p,) = preparer.usable([CHAT])
    return p


def test_spans_hold_the_answers_with_their_ends_and_the_fill() -> None:
    p, last = one(), one(turns="last")
    texts = [STUDENT.decode(p.student_ids[a:b].tolist()) for a, b in p.spans.tolist()]
    assert texts[:2] == [f"{ANSWERS[0]}<|im_end|>\n", f"{ANSWERS[1]}<|im_end|>\n"]
    assert texts[2].startswith("done<|im_end|>\n<|im_end|>")
    assert p.spans[-1, 1] == len(p.student_ids)
    # The same row, only less of it is trained.
    assert np.array_equal(last.student_ids, p.student_ids)
    assert last.spans.tolist() == p.spans[-1:].tolist()


def test_chunks_and_masks_stay_inside_of_the_spans_and_reach_all_of_them() -> None:
    p = one()
    assert p.teacher_ids is not None
    maskable, spelled = set(p.maskable.tolist()), b""
    for t0, t1, s0, s1 in p.chunks.tolist():
        assert bytes_of(TEACHER, p.teacher_ids[t0:t1]) == bytes_of(STUDENT, p.student_ids[s0:s1])
        assert set(range(s0, s1)) <= maskable
        spelled += bytes_of(STUDENT, p.student_ids[s0:s1])
    assert spelled == "".join(ANSWERS).encode()
    seen: set[int] = set()
    for seed in range(40):
        draw = chunk_draw(seed, p.id, 0, p.maskable, len(p.student_ids), p.chunks[:, 2:], 0.5)
        seen |= set(draw.masked.tolist())
    assert seen == maskable


def test_a_teacher_of_the_family_reads_the_positions_of_every_answer(tmp_path: Path) -> None:
    """Prompts between the student's answers hold tokens that the teacher lacks: each answer has its
    own offset.
    """
    backend = Tokenizer.load(TEACHER.name).backend
    backend.add_tokens(["<note>"])
    content = "{{ message['content'] }}"
    note = content + "{% if message['role'] == 'user' %}<note>{% endif %}"
    backend.chat_template = TEACHER.backend.chat_template.replace(content, note)
    backend.save_pretrained(tmp_path / "s")
    student = Tokenizer.load(tmp_path / "s")
    p = one(SharedVocabulary.between(student, TEACHER), student=student)
    assert p.teacher_ids is not None and len(set(p.offsets.tolist())) == 3
    assert np.array_equal(p.teacher_ids[p.asked(p.maskable)[1]], p.student_ids[p.maskable])
    assert TEACHER.decode(p.teacher_ids.tolist()) == student.decode(p.student_ids.tolist())


def sentencepiece(folder: Path, scheme: str) -> Tokenizer:
    """Of Llama 2's kind: a space in front of every text, bytes for what is no word."""
    raw: Any = Raw(models.BPE(unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)  # type: ignore[arg-type]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    settings: dict[str, Any] = {"special_tokens": special, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=420, **settings)
    raw.train_from_iterator([*ANSWERS, "first second third"] * 20, trainer)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, **roles)
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    fast.save_pretrained(folder)
    return Tokenizer.load(folder)


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_a_sentencepiece_student_shares_chunks_with_a_byte_level_teacher(
    scheme: str, tmp_path: Path
) -> None:
    student = sentencepiece(tmp_path / "s", scheme)
    preparer = Preparer(student, TEACHER, LENGTHS, len(student), TEACHER.special_id("mask"), "all")
    (p,) = preparer.usable([CHAT])
    assert p.teacher_ids is not None and preparer.counts["unaligned_bytes"] == 0
    spelled = b""
    for t0, t1, s0, s1 in p.chunks.tolist():
        theirs = bytes_of(TEACHER, p.teacher_ids[t0:t1])
        # The space in front of a text has no bytes of its own.
        assert bytes_of(student, p.student_ids[s0:s1]) in (theirs, b" " + theirs)
        spelled += theirs
    assert spelled == "".join(ANSWERS).encode()


def test_a_full_last_block_without_eos_gets_a_block_that_ends_the_text() -> None:
    """The template's end of turn is not EOS: without it nothing would teach the student to stop."""
    eos = TEACHER.special_id("eos")

    def row(n: int, end_block: bool, student: int = 128) -> Prepared:
        lengths = LengthConfig(student=student, teacher=128, block=32, end_block=end_block)
        example = ChatExample("e", tuple(chat("Count", " ".join(["one"] * n))))
        return Preparer(TEACHER, None, lengths, TEACHER.special_id("mask")).usable([example])[0]

    full = next(n for n in range(1, 80) if eos not in row(n, False).student_ids)
    plain, ended = row(full, False), row(full, True)
    assert len(ended.student_ids) == len(plain.student_ids) + 32
    assert (ended.student_ids[-32:] == eos).all() and ended.spans[-1, 1] == len(ended.student_ids)
    no_room = row(full, True, student=len(plain.student_ids))
    assert len(no_room.student_ids) == len(plain.student_ids)
    # Where some EOS is there already, none is added.
    assert len(row(full - 1, True).student_ids) == len(row(full - 1, False).student_ids)
