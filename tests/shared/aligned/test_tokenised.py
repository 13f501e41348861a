"""Rows that are tokens already give what the same conversation gives as messages."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shared.aligned.alignment import Side
from shared.aligned.examples import Prepared, Preparer, SharedVocabulary
from shared.aligned.sides import sides_of
from shared.data.conversation import ChatExample, conversation
from shared.settings.config import DataConfig
from shared.system.files import Unusable
from shared.text.tokenizers import Tokenizer
from tests.shared.aligned.test_examples import LENGTHS, STUDENT, TEACHER
from tests.shared.aligned.test_same_tokens import OTHER
from tests.shared.aligned.test_same_tokens import STUDENT as SAME

TEXTS = ["x = 1", "def f(x):\n    return 'é🙂你好'  # 3.14\n", " two  words " * 9, "a" * 400]
TURNS = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "x = 2"})
CONFIG = DataConfig("d")


def as_messages(text: str) -> ChatExample:
    question, answer = {"role": "user", "content": "do it"}, {"role": "assistant", "content": text}
    return ChatExample("e", (*TURNS, question, answer))


def places(side: Side) -> np.ndarray:
    """Where the tokens inside of the answer's own words stand, as the reference says it."""
    lead, words = (part.encode() for part in side.bodies[-1])
    ends = np.cumsum([len(side.tokenizer.token_bytes[i]) for i in side.ids[slice(*side.spans[-1])]])
    starts = np.concatenate([[0], ends[:-1]])
    inside = (starts >= len(lead)) & (ends <= len(lead) + len(words)) & (starts < ends)
    return side.spans[-1, 0] + np.flatnonzero(inside)


def row_of(text: str, student: Tokenizer, teacher: Tokenizer, pairs: bool, cut: int = 9**9) -> Any:
    """The reference's columns of a conversation; the student's are cut off at `cut`."""
    both = [
        sides_of([as_messages(text)], 0, tokenizer, -1, "last", Counter())[0]
        for tokenizer in (student, teacher)
    ]
    ours, theirs = (places(side) for side in both if isinstance(side, Side))
    ids, teacher_ids = (side.ids.tolist() for side in both if isinstance(side, Side))
    response = int(both[0].spans[-1, 0])  # type: ignore[union-attr]
    row = {"input_ids": ids[:cut], "labels": ([-100] * response + ids[response:])[:cut]}
    if not pairs:
        ranges = [[0, 1, 0, 1], [theirs[0], theirs[-1] + 1, ours[0], ours[-1] + 1]]
        ranges = [[int(place) for place in edges] for edges in ranges]
        return {**row, "teacher_input_ids": teacher_ids, "ranges": ranges, "prompt_len": response}
    kept = ours < cut
    row |= {"align_student": ours[kept].tolist(), "align_teacher": theirs[kept].tolist()}
    return {**row, "teacher_input_ids": teacher_ids[: row["align_teacher"][-1] + 1]}


def preparer(pairs: bool) -> Preparer:
    if not pairs:
        masks = STUDENT.special_id("mask", "<|mask|>"), TEACHER.special_id("mask")
        return Preparer(STUDENT, TEACHER, LENGTHS, *masks)
    shared, mask = SharedVocabulary.between(SAME, OTHER), SAME.special_id("mask")
    return Preparer(SAME, shared, LENGTHS, mask, mask, own_text=True)


def prepared(row: Any, pairs: bool) -> Prepared | Unusable:
    found = conversation(row, CONFIG)
    assert found is not None and found[1] == "tokens"
    return preparer(pairs)([found[0]])[0]


@pytest.mark.parametrize("pairs", [False, True])
def test_tokens_give_what_messages_give(pairs: bool) -> None:
    tokenizers = (SAME, OTHER) if pairs else (STUDENT, TEACHER)
    for text in TEXTS:
        (expected,) = preparer(pairs).usable([as_messages(text)])
        got = prepared(row_of(text, *tokenizers, pairs), pairs)
        assert isinstance(got, Prepared) and got.id != expected.id
        assert len(got.chunks) or (got.pairs is not None and len(got.pairs))
        for name in ("student_ids", "spans", "chunks", "pairs"):
            assert np.array_equal(getattr(got, name), getattr(expected, name)), (text, name)
        assert got.teacher_ids is not None and expected.teacher_ids is not None
        read = int(got.pairs[-1, 1]) + 1 if got.pairs is not None else len(got.teacher_ids)
        assert np.array_equal(got.teacher_ids[:read], expected.teacher_ids[:read])


@pytest.mark.parametrize("pairs", [False, True])
def test_an_answer_that_was_cut_off_gets_no_end_and_is_not_told_to_the_teacher(pairs: bool) -> None:
    tokenizers = (SAME, OTHER) if pairs else (STUDENT, TEACHER)
    text = "some words of an answer " * 12
    whole = row_of(text, *tokenizers, pairs)["input_ids"]
    got = prepared(row_of(text, *tokenizers, pairs, cut=len(whole) - 8), pairs)
    assert isinstance(got, Prepared)
    kept = (len(whole) - 8) // LENGTHS.block * LENGTHS.block
    assert got.student_ids.tolist() == whole[:kept]
    assert got.teacher_ids is not None
    last = got.chunks[-1, 1] if not pairs else None
    assert last is None or len(got.teacher_ids) == last


def test_columns_that_do_not_fit_and_tokens_of_others_are_refused() -> None:
    row = row_of(TEXTS[1], STUDENT, TEACHER, False)
    wrong: list[dict[str, Any]] = [
        {"labels": row["labels"][1:]}, {"labels": [-100] * len(row["labels"])}, {"labels": None},
        {"ranges": [[0, 1, 0, 1]]}, {"ranges": [[1, 2]]}, {"ranges": 3}, {"ranges": ["abcd"]},
        {"input_ids": "ids"}, {"input_ids": [True] * len(row["labels"])},
    ]  # fmt: skip
    for change in wrong:
        with pytest.raises(Unusable):
            conversation({**row, **change}, CONFIG)
    foreign = [(i + 700) % 4000 for i in row["teacher_input_ids"]]
    for ids in (foreign, [10**6] * len(foreign)):
        result = prepared({**row, "teacher_input_ids": ids}, False)
        assert isinstance(result, Unusable) and "another tokenizer" in result.reason


def test_a_row_that_has_messages_beside_its_tokens_is_read_by_them() -> None:
    row = {**row_of(TEXTS[0], STUDENT, TEACHER, False), "messages": list(TURNS)}
    found = conversation(row, CONFIG)
    assert found is not None and found[1] == "messages" and found[0].tokens is None
    tokens = conversation(row, replace(CONFIG, form="tokens"))
    assert tokens is not None and tokens[0].tokens is not None
