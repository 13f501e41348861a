"""Whatever the blocks and the stops: what is sent, put together, is the text of the whole."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.serving.engine import Answer
from student_train.using.student import LoadedStudent, Stops, load_for_use, until_eos


@pytest.fixture(scope="module")
def tiny() -> LoadedStudent:
    return load_for_use("student_train/tiny_students/shared", "cpu")


@settings(max_examples=150, deadline=None)
@given(
    text=st.text("ab \nß→🙂", max_size=40),
    stops=st.lists(st.text("ab \nß🙂", min_size=1, max_size=3), max_size=3),
    block=st.integers(1, 9),
    limit=st.integers(1, 60),
    more=st.integers(0, 8),
)
@example(text="aba", stops=["b", "aba"], block=1, limit=2, more=0)  # one within another
@example(text="🙂", stops=[], block=1, limit=60, more=0)  # half a character waits
def test_pieces_are_the_whole(
    tiny: LoadedStudent, text: str, stops: list[str], block: int, limit: int, more: int
) -> None:
    ids = [*tiny.tokenizer.encode([text])[0], *[tiny.special.eos] * (1 + more)]
    ids += [tiny.special.eos] * (-len(ids) % block)
    answer = Answer(Stops.of(tiny, stops), limit)
    sent = ""
    for end in range(block, len(ids) + block, block):
        piece = answer.read(ids[:end])
        sent += piece.text
        assert piece.tokens <= limit
        if piece.reason is not None:
            break
    else:
        raise AssertionError("it never ended")
    whole = until_eos(ids, tiny.special.eos)
    wanted, stopped = Stops.of(tiny, stops).cut(whole[:limit])
    assert sent == wanted
    if len(whole) != limit:  # where the end comes just at the limit, it may not have been seen
        assert piece.reason == ("stop" if stopped or len(whole) < limit else "length")
