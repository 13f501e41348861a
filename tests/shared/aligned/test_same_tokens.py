"""What a teacher of the student's tokenizer reads, and where it is asked: the words, or all of the
response. Several trained answers in one row: spans, masks and teacher positions hold for all.
"""

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.tools.tiny_models import CHATML_TEMPLATE
from shared.aligned.examples import Prepared, Preparer, SharedVocabulary
from shared.cache.row import CacheRow
from shared.cache.shards import Unit
from shared.data.conversation import ChatExample
from shared.diffusion import chunk_draw
from shared.settings.config import LengthConfig
from shared.system.files import Unusable
from shared.text.tokenizers import Tokenizer
from teacher_cache.run.build import build_cache
from tests.conftest import TEACHER_TOKENIZER, small_cache_config, write_chats
from tests.reading import rows_in
from tests.shared.aligned.test_examples import LENGTHS, chat, check_chunks
from tests.shared.aligned.test_examples import STUDENT as CHATML

STUDENT = Tokenizer.load(TEACHER_TOKENIZER)
EOS, EOT = STUDENT.special_id("eos"), STUDENT.special_id("x", "<|eot_id|>")
# The same tokens under another template.
OTHER = Tokenizer.load(TEACHER_TOKENIZER)
BRACKETS = CHATML_TEMPLATE.replace("<|im_start|>", "[").replace("<|im_end|>", "<|eot_id|>")
OTHER.backend.chat_template = BRACKETS


def prepared(text: str, teacher: Any = STUDENT, lengths: Any = LENGTHS, **more: Any) -> Prepared:
    shared = SharedVocabulary.between(STUDENT, teacher)
    mask = STUDENT.special_id("mask")
    (p,) = Preparer(STUDENT, shared, lengths, mask, mask, **more).usable([chat(text)])
    return p


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1)


@given(words.filter(str.strip))
def test_the_words_are_the_content_and_nothing_else(text: str) -> None:
    p = prepared(text, positions="content")
    assert p.pairs is not None and p.teacher_ids is None
    assert np.array_equal(p.pairs[:, 0], p.pairs[:, 1])
    ids = p.student_ids[p.pairs[:, 0]].tolist()
    assert not {EOS, EOT} & set(ids)
    whole = b"".join(STUDENT.token_bytes[i] for i in ids)
    assert whole == text.encode()[: len(whole)]
    assert len(whole) == len(text.encode()) or p.spans[-1, 1] == LENGTHS.student


def test_all_of_the_response_by_default() -> None:
    for p in (prepared("x = 1"), Preparer(STUDENT, None, LENGTHS, 4095).usable([chat("x = 1")])[0]):
        assert p.shared and p.teacher_ids is None and p.pairs is None and len(p.chunks) == 0
        which, places = p.asked(p.maskable)
        assert np.array_equal(which, np.arange(len(p.maskable)))
        assert np.array_equal(places, p.maskable)
        assert {EOS, EOT} <= set(p.student_ids[places].tolist())


def test_its_own_template_with_a_clean_fill() -> None:
    text = "def f(x):\n    return x + 1"
    p = prepared(text, OTHER, own_text=True)
    assert p.pairs is not None and p.teacher_ids is not None
    assert OTHER.decode(p.teacher_ids.tolist()).startswith("[user")
    assert len(p.teacher_ids) % LENGTHS.block == 0 and p.teacher_ids[-1] == EOS
    assert np.array_equal(p.student_ids[p.pairs[:, 0]], p.teacher_ids[p.pairs[:, 1]])
    assert not (p.pairs[:, 0] == p.pairs[:, 1]).all()  # two templates: other places
    assert STUDENT.decode(p.student_ids[p.pairs[:, 0]].tolist()) == text
    # Of what is masked, the words are asked.
    masked = p.maskable[::2]
    which, places = p.asked(masked)
    assert np.array_equal(p.teacher_ids[places], p.student_ids[masked[which]])
    assert set(masked[which].tolist()) == set(masked.tolist()) & set(p.pairs[:, 0].tolist())


def test_a_shifted_teacher_is_never_asked_about_position_0() -> None:
    bare = Tokenizer.load(TEACHER_TOKENIZER)
    bare.backend.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    shared, mask = SharedVocabulary.between(bare, bare), STUDENT.special_id("mask")
    for positions in ("content", "response"):
        preparer = Preparer(bare, shared, LENGTHS, mask, mask, "last", positions, skip_first=True)  # type: ignore[arg-type]
        (p,) = preparer.usable([chat("x = 1", request="")])
        assert 0 not in p.asked(p.maskable)[1]


@pytest.mark.parametrize(("own_text", "positions"), [(True, "content"), (False, "response")])
def test_lengths_teacher_takes_effect(own_text: bool, positions: str) -> None:
    text = "; ".join(f"y = {i}" for i in range(40))
    lengths = dataclasses.replace(LENGTHS, teacher=64)
    teacher = OTHER if own_text else STUDENT
    p = prepared(text, teacher, lengths, own_text=own_text, positions=positions)
    assert p.teacher_ids is not None and len(p.teacher_ids) == 64
    assert p.pairs is not None and 0 < len(p.pairs) < len(p.maskable)
    assert p.pairs[:, 1].max() < 64
    assert np.array_equal(p.student_ids[p.pairs[:, 0]], p.teacher_ids[p.pairs[:, 1]])


SHORT = LengthConfig(student=128, teacher=256, block=32)
ANSWERS = ["x = 1 + 2", "def f():\n    return 3", "done"]
TURNS = [chat(a, q).messages for a, q in zip(ANSWERS, ("first", "second", "third"), strict=True)]
CHAT = ChatExample("e", tuple(itertools.chain(*TURNS)))


def one(teacher: Any = STUDENT, turns: Any = "all", student: Any = CHATML) -> Prepared:
    masks = student.special_id("mask"), STUDENT.special_id("mask")
    (p,) = Preparer(student, teacher, SHORT, *masks, turns).usable([CHAT])
    return p


def test_spans_hold_the_answers_with_their_ends_and_the_fill() -> None:
    p, last = one(), one(turns="last")
    texts = [CHATML.decode(p.student_ids[a:b].tolist()) for a, b in p.spans.tolist()]
    assert texts[:2] == [f"{ANSWERS[0]}<|im_end|>\n", f"{ANSWERS[1]}<|im_end|>\n"]
    assert texts[2].replace("<|im_end|>", "") == "done\n"
    assert p.spans[-1, 1] == len(p.student_ids) == 64
    assert p.student_ids[-1] == CHATML.special_id("eos")
    # The same row, only less of it is trained.
    assert np.array_equal(last.student_ids, p.student_ids)
    assert last.spans.tolist() == p.spans[-1:].tolist()


def test_chunks_and_masks_stay_inside_of_the_spans_and_reach_all_of_them() -> None:
    p = one()
    maskable, seen = set(p.maskable.tolist()), set()
    assert check_chunks(p, "".join(ANSWERS)) == "".join(ANSWERS).encode()
    assert {i for _, _, s0, s1 in p.chunks.tolist() for i in range(s0, s1)} <= maskable
    for seed in range(40):
        draw = chunk_draw(seed, p.id, 0, p.maskable, len(p.student_ids), p.chunks[:, 2:], 0.5)
        seen |= set(draw.masked.tolist())
    assert seen == maskable


@pytest.fixture(scope="module")
def thinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's tokenizer with two tokens of the student's own, as Qwen has, in prompts."""
    backend = Tokenizer.load(TEACHER_TOKENIZER).backend
    backend.add_tokens(["<think>", "</think>"])  # no control tokens
    content = "{{ message['content'] }}"
    think = "{% if message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}" + content
    backend.chat_template = STUDENT.backend.chat_template.replace(content, think)
    folder = tmp_path_factory.mktemp("thinking")
    backend.save_pretrained(folder)
    return folder


def test_a_token_of_the_students_own_is_written_out_in_a_prompt_and_refused_in_an_answer(
    thinking: Path,
) -> None:
    student = Tokenizer.load(thinking)
    same = SharedVocabulary.between(student, STUDENT)
    preparer = Preparer(student, same, LENGTHS, student.special_id("mask"))
    p, left_out = preparer([chat("x = 1"), chat("a <think> b")])
    assert isinstance(left_out, Unusable) and isinstance(p, Prepared) and p.shared
    turns = one(same, student=student)
    assert len(set(turns.offsets.tolist())) == 3  # each answer has its own
    for row in (p, turns):
        assert row.teacher_ids is not None and row.teacher_ids.max() < 4096
        assert 4096 in row.student_ids[: row.spans[0, 0]] and (row.offsets > 0).all()
        assert STUDENT.decode(row.teacher_ids.tolist()) == student.decode(row.student_ids.tolist())
        places = row.asked(row.maskable)[1]
        assert np.array_equal(row.teacher_ids[places], row.student_ids[row.maskable])


def rows_of(student: Path, teacher: Path, texts: list[str], out: Path, k: int) -> list[CacheRow]:
    """Of a cache of these responses."""
    data = write_chats(out.with_suffix(".jsonl"), texts)
    changes = {"data": data, "student_tokenizer": str(student), "targets": {"k": k}}
    build_cache(small_cache_config("tiny-shared", teacher, out, **changes))
    return [row for row in rows_in(out, Unit(0, 0)) if row.masked.size]


def test_the_cache_reads_the_right_positions(
    thinking: Path, random_teacher: Path, tmp_path: Path
) -> None:
    texts = ["x = 1 + 2 + 3", "def f():\n    return 1"]
    rows = rows_of(thinking, random_teacher, texts, tmp_path / "c", 8)
    assert rows
    for row in rows:
        assert row.teacher_ids is not None and row.teacher_masked is not None
        assert np.array_equal(row.teacher_ids[row.teacher_masked], row.student_ids[row.masked])
        assert row.topk_ids is not None and row.topk_ids.max() < 4096


def test_ids_that_mean_something_else_never_enter_the_top_k(
    random_teacher: Path, tmp_path: Path
) -> None:
    """A student whose added tokens carry other names: the teacher's logits there are tail."""
    folder = Path(shutil.copytree(TEACHER_TOKENIZER, tmp_path / "s"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        path = folder / name
        path.write_text(path.read_text().replace("<|start_header_id|>", "<|other|>"))
    student = Tokenizer.load(folder)
    same = SharedVocabulary.between(student, STUDENT).same
    changed = student.special_id("x", "<|other|>")
    assert np.flatnonzero(~same).tolist() == [changed]
    rows = rows_of(folder, random_teacher, ["x = 1 + 2 + 3"] * 3, tmp_path / "c", 4095)
    assert rows
    for row in rows:
        assert row.topk_ids is not None
        assert changed not in row.topk_ids.tolist()
        assert len(set(row.topk_ids[:4095].tolist())) == 4095
