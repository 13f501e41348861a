"""Every form that people have becomes the same conversation; all that an answer has is kept."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.data.conversation import UNTRAINED, copies, in_split, parse
from shared.data.reading import iter_examples, scan
from shared.settings.data import DataConfig, RowFilter
from shared.system.files import Unusable
from tests.shared.data.test_files import write_lines

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CALLED = {"role": "assistant", "content": ""}
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {**ANSWER, "content": ["a"]}]
NAMED = [{**SYSTEM, "role": "developer"}, {**USER, "role": "Human"}, {**ANSWER, "role": "model"}]
INPUT = {"role": "user", "content": "q\n\nx"}
Messages = list[dict[str, Any]]
FORMS: list[tuple[dict[str, Any], Messages]] = [
    ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
    ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER]),  # nobody answers the last question
    ({"messages": PARTS}, [USER, ANSWER]),
    ({"messages": NAMED}, [SYSTEM, USER, ANSWER]),
    ({"conversations": SHAREGPT, "system": "s"}, [SYSTEM, USER, ANSWER]),
    ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
    ({"instruction": "q", "input": "", "output": "a"}, [USER, ANSWER]),
    ({"instruction": "q", "input": "x", "output": "a", "system": "s"}, [SYSTEM, INPUT, ANSWER]),
    ({"instruction": "q", "output": "a", "history": [["q", "a"]]}, [USER, ANSWER, USER, ANSWER]),
    ({"instruction": "q", "instances": [{"input": "", "output": "a"}]}, [USER, ANSWER]),
    ({"prompt": "q", "completion": "a"}, [USER, ANSWER]),
    ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
    ({"question": "q", "answer": "a"}, [USER, ANSWER]),
    ({"question": "q", "response": "a"}, [USER, ANSWER]),
]


def said(row: dict[str, Any], **settings: Any) -> Messages:
    return list(parse(row, DataConfig("d", **settings))[0].messages)


def test_every_form_becomes_messages() -> None:
    for row, expected in FORMS:
        assert said(row) == expected
        assert said({**row, "source": "x", "score": 3, "text": None}) == expected


def test_named_fields_and_forms_override_what_is_detected() -> None:
    row = {"ask": "q", "say": "a", "who": "s", "messages": [ANSWER], "chat": [USER, ANSWER]}
    assert said(row) == [ANSWER]
    named = said(row, prompt_field="ask", response_field="say", system_field="who")
    assert named == [SYSTEM, USER, ANSWER]
    assert said(row, messages_field="chat") == [USER, ANSWER]
    both = {"instruction": "x", "output": "y", "question": "q", "answer": "a"}
    assert said(both, form="question_answer") == [USER, ANSWER]
    with pytest.raises(Unusable) as error:
        said({"prompt": "p", "canonical_solution": "c"})
    assert "canonical_solution" in error.value.what and "data.prompt_field" in error.value.what


def test_what_an_answer_has_beside_its_text_is_kept() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "function", "name": "weather", "content": "sun", "tool_call_id": 1}
    row = {"messages": [USER, call, result, ANSWER], "tools": '[{"name": "weather"}]'}
    example, _ = parse(row, DataConfig("d"))
    assert example.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert example.messages[2] == {**result, "role": "tool", "tool_call_id": "1"}
    assert example.tools == [{"name": "weather"}]
    # Tools are part of the content.
    assert example.id != parse({**row, "tools": None}, DataConfig("d"))[0].id
    for name in ("reasoning_content", "reasoning", "thinking"):
        thought = said({"messages": [USER, {**ANSWER, name: "hm"}]})[-1]
        assert thought == {**ANSWER, "reasoning_content": "hm"}


def test_who_reads_contents_alone_is_given_no_answer_that_is_more(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    thought = {**ANSWER, "reasoning_content": "Two and two."}
    config = write_lines(tmp_path / "d.jsonl", [{"messages": [USER, a]} for a in (call, thought)])
    assert not list(iter_examples(config))
    assert [e.messages[-1] for e in scan(config)[0]] == [call, thought]


def test_json_that_stands_as_text_in_calls_and_tools_is_read() -> None:
    arguments = '{"city": "Oslo", "note": "{}"}'
    schema = {"type": "object", "properties": {"arguments": {"type": "string"}}}
    function = {"name": "weather", "arguments": json.loads(arguments)}
    as_text = {"name": "weather", "arguments": arguments}
    called = {**CALLED, "tool_calls": [{"function": function}]}
    tools = [{"function": {"parameters": schema}}]
    expected = parse({"messages": [USER, called], "tools": tools}, DataConfig("d"))
    for said in (
        {"tool_calls": [{"function": as_text}]},
        {"tool_calls": json.dumps([{"function": as_text}])},
        {"function_call": as_text},
    ):
        row = {"messages": [USER, {**CALLED, **said}]}
        tools = [{"function": {"parameters": json.dumps(schema)}}]
        assert parse({**row, "tools": json.dumps(tools)}, DataConfig("d")) == expected
    # What is no object stays what it is.
    for odd in ("print(1)", "5"):
        call = {**CALLED, "tool_calls": [{"function": {**function, "arguments": odd}}]}
        assert parse({"messages": [USER, call]}, DataConfig("d"))[0].messages[1] == call


@pytest.mark.parametrize("mark", ["weight", "loss_mask", "train", "training", "loss"])
@pytest.mark.parametrize("off", [0, False, "false", 0.0, "FALSE", "no"])
def test_what_a_row_says_of_its_own_training_is_heard(mark: str, off: Any) -> None:
    """By an answer or by the whole row; what is neither yes nor no is reported."""
    poor, more = {**ANSWER, mark: off}, {"role": "user", "content": "more"}
    first, _ = parse({"messages": [USER, poor, more, {**ANSWER, mark: True}]}, DataConfig("d"))
    assert first.messages == (USER, {**ANSWER, "train": False}, more, ANSWER)
    last, _ = parse({"messages": [USER, ANSWER, more, poor]}, DataConfig("d"))
    assert last.messages == (USER, ANSWER) and not last.unread
    for row in ({"messages": [USER, poor]}, {"question": "q", "answer": "a", mark: off}):
        with pytest.raises(Unusable) as error:
            parse(row, DataConfig("d"))
        assert error.value.reason == UNTRAINED
    half = {**ANSWER, mark: 0.5, "mask": True}
    assert len(parse({"messages": [USER, half], mark: 0.5}, DataConfig("d"))[0].unread) == 3


@pytest.mark.parametrize(
    "beside",
    [{"assistant_masks": [0, 1]}, {"completion_mask": [1]}, {"rating": 1}, {"rejected": "b"},
     {"train_on_input": True}, {"mask": False}, {"\ud800": 1}],
    ids=ascii,
)  # fmt: skip
@pytest.mark.parametrize("form", [{"messages": [USER, ANSWER]}, {"prompt": "q", "completion": "a"}])
def test_a_field_that_nothing_reads_is_named(beside: dict[str, Any], form: dict[str, Any]) -> None:
    whole = {**form, "id": 7, "tools": None, "weight": 1, "note": ""}
    assert not parse(whole, DataConfig("d"))[0].unread
    (name,) = parse({**whole, **beside}, DataConfig("d"))[0].unread
    assert repr(next(iter(beside)))[1:-1] in name
    name.encode()


@pytest.mark.parametrize("no", [False, "False"])
def test_a_completion_to_learn_against_is_not_learnt(no: Any) -> None:
    row = {"prompt": "q", "completion": "a", "label": True}
    assert parse(row, DataConfig("d"))[1] == "prompt_completion"
    with pytest.raises(Unusable) as error:
        parse({**row, "label": no}, DataConfig("d"))
    assert error.value.reason == UNTRAINED


@pytest.mark.parametrize("kind", ["flat", "function_call", "tool_call", "several"])
def test_a_call_is_one_however_it_is_written(kind: str) -> None:
    function = {"name": "weather", "arguments": {"city": "Oslo"}}
    calls = [{"type": "function", "function": function}] * (2 if kind == "several" else 1)
    written: dict[str, Any] = {"from": "function_call", "value": json.dumps(function)}
    if kind == "flat":
        written = {"from": "gpt", "value": None, "tool_calls": [function]}
    elif kind == "several":
        written["value"] = json.dumps([function, function])
    elif kind == "tool_call":
        written["from"] = kind
    turns = [{"from": "human", "value": "q"}, written, {"from": "tool_response", "value": "sun"}]
    messages = said({"conversations": [*turns, {"from": "gpt", "value": "It is sunny."}]})
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": calls}
    assert messages[2]["role"] == "tool"


@pytest.mark.parametrize("line", [
    '{"messages": [{"role": "assistant", "content": "a", "content": "b"}]}',
    '{"messages": [{"role": "assistant", "content": "a"}], "tools": [{"limit": 1e999}]}',
    '{"messages": [{"role": "assistant", "content": "a"}], "tools": [{"limit": NaN}]}',
    '{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": NaN}}]}]}',
    '{"messages": [{"role": "assistant", "content": "a"}], "tools": {"name": "f"}}',
    '{"messages": [{"role": "assistant", "content": "a"}], "tools": ["f"]}',
])  # fmt: skip
def test_what_json_cannot_say_twice_or_at_all_costs_its_row(line: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(line + "\n" + json.dumps({"messages": [USER, ANSWER]}))
    examples, bad = scan(DataConfig(str(tmp_path / "d.jsonl")))
    assert (len(examples), len(bad)) == (1, 1)


@pytest.mark.parametrize("place", ["role", "name", "call", "tools", "id"])
def test_a_lone_surrogate_anywhere_costs_its_row_at_most(place: str, tmp_path: Path) -> None:
    odd = "\ud800"
    function = {"name": odd if place == "call" else "f", "arguments": {}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    named = {**USER, "name": odd if place == "name" else "n"}
    rows: list[dict[str, Any]] = [
        {"messages": [named, {**ANSWER, **({"role": odd} if place == "role" else call)}]}
    ]
    rows[0] |= {"tools": [{"name": odd if place == "tools" else "f"}]}
    rows[0] |= {"id": odd if place == "id" else "i"}
    source = write_lines(tmp_path / "d.jsonl", [*rows, {"messages": [USER, ANSWER]}]).source
    examples, bad = scan(DataConfig(source))
    assert (len(examples), len(bad)) == ((2, 0) if place == "id" else (1, 1))
    "".join(example.label for example in examples).encode()


NAMES = ["messages", "role", "content", "from", "value", "instruction", "output", "prompt"]
NAMES += ["completion", "conversations", "tools", "history", "instances"]
names = st.sampled_from(NAMES)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
)


@given(values)
def test_any_row_is_a_conversation_or_unusable(row: Any) -> None:
    with contextlib.suppress(Unusable):
        example, _ = parse(row, DataConfig("d"))
        assert example.messages[-1]["role"] == "assistant"


def test_filters(tmp_path: Path) -> None:
    languages = enumerate(["py", "c", "py", "python"])
    rows = [{"question": str(i), "answer": "a", "meta": {"lang": name}} for i, name in languages]
    source = write_lines(tmp_path / "d.jsonl", rows).source

    def asked(*rules: RowFilter) -> list[str]:
        return [e.messages[0]["content"] for e in iter_examples(DataConfig(source, filter=rules))]

    contains = RowFilter("meta.lang", contains="py")
    assert asked(RowFilter("meta.lang", equals="py")) == ["0", "2"]
    assert asked(contains) == ["0", "2", "3"]
    assert asked(contains, RowFilter("question", equals="3")) == ["3"]
    assert asked(RowFilter("meta.nothing.deeper", equals="py")) == []


@given(st.lists(st.text(max_size=3), min_size=1, max_size=60), st.floats(0.05, 0.95))
def test_a_held_out_content_is_never_trained_on_however_often_it_stands_there(
    texts: list[str], share: float
) -> None:
    keys = [parse({"question": "q", "answer": f"{t}."}, DataConfig("d"))[0].id for t in texts]
    parts: Any = ("train", "heldout")
    sides = [DataConfig("d", split=part, heldout_share=share) for part in parts]
    assert all(in_split(key, sides[0]) != in_split(key, sides[1]) for key in keys)


def test_shares_and_weights_are_about_right() -> None:
    keys = [f"{i:024x}" for i in range(4000)]
    config = DataConfig("d", split="heldout", heldout_share=0.1)
    assert 320 < sum(in_split(key, config) for key in keys) < 480
    for weight in (0.3, 1.0, 2.5):
        total = sum(copies(key, DataConfig("d", weight=weight)) for key in keys)
        assert abs(total / 4000 - weight) < 0.04
