"""What a teacher of the student's tokenizer reads, and where it is asked: the words, or all of the
response.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.tools.tiny_models import CHATML_TEMPLATE
from shared.aligned.examples import Prepared, Preparer, SharedVocabulary
from shared.settings.config import LengthConfig
from shared.text.tokenizers import Tokenizer
from tests.conftest import TEACHER_TOKENIZER
from tests.shared.aligned.test_examples import LENGTHS, chat

STUDENT = Tokenizer.load(TEACHER_TOKENIZER)
EOS, EOT = STUDENT.special_id("eos"), STUDENT.special_id("x", "<|eot_id|>")
# The same tokens under another template.
OTHER = Tokenizer.load(TEACHER_TOKENIZER)
BRACKETS = CHATML_TEMPLATE.replace("<|im_start|>", "[").replace("<|im_end|>", "<|eot_id|>")
OTHER.backend.chat_template = BRACKETS


def prepared(
    text: str, teacher: Tokenizer = STUDENT, lengths: LengthConfig = LENGTHS, **settings: Any
) -> Prepared:
    shared = SharedVocabulary.between(STUDENT, teacher)
    mask = STUDENT.special_id("mask")
    (p,) = Preparer(STUDENT, shared, lengths, mask, mask, **settings).usable([chat(text)])
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


@pytest.mark.parametrize(
    ("own_text", "positions"), [(True, "content"), (False, "content"), (False, "response")]
)
def test_lengths_teacher_takes_effect(own_text: bool, positions: str) -> None:
    text = "; ".join(f"y = {i}" for i in range(40))
    lengths = dataclasses.replace(LENGTHS, teacher=64)
    teacher = OTHER if own_text else STUDENT
    p = prepared(text, teacher, lengths, own_text=own_text, positions=positions)
    assert p.teacher_ids is not None and len(p.teacher_ids) == 64
    assert p.pairs is not None and 0 < len(p.pairs) < len(p.maskable)
    assert p.pairs[:, 1].max() < 64
    assert np.array_equal(p.student_ids[p.pairs[:, 0]], p.teacher_ids[p.pairs[:, 1]])
