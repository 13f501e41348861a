from __future__ import annotations

import pytest

from student_train.using.student import LoadedStudent, Stops, load_for_use


@pytest.fixture(scope="module")
def tiny() -> LoadedStudent:
    return load_for_use("student_train/tiny_students/shared", "cpu")


def test_the_first_stop_counts_and_nothing_of_it_is_left(tiny: LoadedStudent) -> None:
    ids = tiny.tokenizer.encode(["return one, two"])[0]
    assert Stops.of(tiny, None).cut(ids) == ("return one, two", False)
    assert Stops.of(tiny, ["", "none"]).cut(ids) == ("return one, two", False)
    assert Stops.of(tiny, "one").cut(ids) == ("return ", True)
    assert Stops.of(tiny, ["two", ","]).cut(ids) == ("return one", True)
    assert Stops.of(tiny, ["return"]).cut(ids) == ("", True)


def test_a_special_token_is_found_though_the_text_has_none(tiny: LoadedStudent) -> None:
    start = tiny.tokenizer.special_id("", "<|start_header_id|>")
    ids = [*tiny.tokenizer.encode(["one"])[0], start, *tiny.tokenizer.encode([" two"])[0]]
    assert tiny.text(ids) == "one two"
    assert Stops.of(tiny, ["<|start_header_id|>"]).cut(ids) == ("one", True)
    assert Stops.of(tiny, ["<|start_header_id|>", "ne"]).cut(ids) == ("o", True)


def test_what_may_begin_a_stop(tiny: LoadedStudent) -> None:
    stops = Stops.of(tiny, ["\n\ndef", "STOP"])
    for text, held in [
        ("x\n", 1),
        ("x\n\nde", 4),
        ("x\n\ndx", 0),
        ("xST", 2),
        ("", 0),
        ("S", 1),
        ("STOX", 0),
    ]:
        assert stops.may_begin(text) == held
    assert Stops.of(tiny, None).may_begin("x") == 0
