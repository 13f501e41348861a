"""Every form that people have becomes the same conversation; what an answer has beside its text is kept."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.data import iter_examples, scan
from shared.data.conversation import copies, in_split, parse
from shared.settings.config import DataConfig, RowFilter
from shared.system.errors import TideError, Unusable

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def said(row: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    return list(parse(row, DataConfig("d", **settings))[0].messages)


FORMS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "messages": ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            "system": "s",
        },
        [SYSTEM, USER, ANSWER],
    ),
    "sharegpt with roles": ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
    "instruction": ({"instruction": "q", "input": "", "output": "a"}, [USER, ANSWER]),
    "instruction with input": (
        {"instruction": "q", "input": "x", "output": "a", "system": "s"},
        [SYSTEM, {"role": "user", "content": "q\n\nx"}, ANSWER],
    ),
    "instruction with history": (
        {"instruction": "q", "output": "a", "history": [["q", "a"]]},
        [USER, ANSWER, USER, ANSWER],
    ),
    "instances": (
        {"instruction": "q", "instances": [{"input": "", "output": "a"}]},
        [USER, ANSWER],
    ),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, [USER, ANSWER]),
    "prompt and completion as lists": (
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        [SYSTEM, USER, ANSWER],
    ),
    "question and answer": ({"question": "q", "answer": "a"}, [USER, ANSWER]),
    "question and response": ({"question": "q", "response": "a"}, [USER, ANSWER]),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {**ANSWER, "content": ["a"]},
            ]
        },
        [USER, ANSWER],
    ),
    "roles of other names": (
        {
            "messages": [
                {"role": "developer", "content": "s"},
                {"role": "Human", "content": "q"},
                {**ANSWER, "role": "model"},
            ]
        },
        [SYSTEM, USER, ANSWER],
    ),
    "a last question without answer": ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER]),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_becomes_messages(name: str) -> None:
    row, expected = FORMS[name]
    assert said(row) == expected
    assert said({**row, "source": "x", "score": 3, "text": None}) == expected


def test_named_fields_and_forms_override_what_is_detected() -> None:
    row = {"ask": "q", "say": "a", "who": "s", "messages": [ANSWER], "chat": [USER, ANSWER]}
    assert said(row) == [ANSWER]
    assert said(row, prompt_field="ask", response_field="say", system_field="who") == [
        SYSTEM,
        USER,
        ANSWER,
    ]
    assert said(row, messages_field="chat") == [USER, ANSWER]
    assert said(
        {"instruction": "x", "output": "y", "question": "q", "answer": "a"}, form="question_answer"
    ) == [USER, ANSWER]


def test_an_unknown_form_names_what_was_found_and_what_to_set() -> None:
    with pytest.raises(
        Unusable,
        match=r"fields 'prompt', 'canonical_solution': set data.prompt_field and data.response",
    ):
        said({"prompt": "p", "canonical_solution": "c"})


CALL = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}


def test_what_an_answer_has_beside_its_text_is_kept() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "function", "name": "weather", "content": "sun", "tool_call_id": 1}
    example, _ = parse(
        {"messages": [USER, call, result, ANSWER], "tools": '[{"name": "weather"}]'},
        DataConfig("d"),
    )
    assert example.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert example.messages[2] == {
        "role": "tool",
        "content": "sun",
        "name": "weather",
        "tool_call_id": "1",
    }
    assert example.tools == [{"name": "weather"}]
    for name in ("reasoning_content", "reasoning", "thinking"):
        assert said({"messages": [USER, {**ANSWER, name: "hm"}]})[-1] == {
            **ANSWER,
            "reasoning_content": "hm",
        }


def test_who_reads_contents_alone_is_given_no_answer_that_is_more_than_a_text(
    tmp_path: Path,
) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    thought = {**ANSWER, "reasoning_content": "Two and two."}
    source = write(tmp_path / "d.jsonl", [{"messages": [USER, a]} for a in (call, thought)])
    with pytest.raises(TideError, match="has no examples"):
        scan(DataConfig(source))
    strict = DataConfig(source, allow_bad_rows=0)
    with pytest.raises(TideError, match="tool_calls, which only a chat template can write"):
        scan(strict)
    assert scan(strict, extras=True).examples == 2
    assert [e.messages[-1] for e in iter_examples(strict, extras=True)] == [call, thought]


def test_tools_are_part_of_the_content() -> None:
    row = {"messages": [USER, ANSWER]}
    keys = {
        parse({**row, "tools": tools}, DataConfig("d"))[0].id
        for tools in (None, [], [{"name": "a"}])
    }
    assert len(keys) == 2


NAMES = [
    "messages",
    "role",
    "content",
    "from",
    "value",
    "instruction",
    "output",
    "prompt",
    "completion",
    "conversations",
    "tools",
    "history",
    "instances",
]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
)


@given(values)
def test_any_row_is_a_conversation_or_unusable(row: Any) -> None:
    with contextlib.suppress(Unusable):
        example, _ = parse(row, DataConfig("d"))
        assert example.messages[-1]["role"] == "assistant"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_filters(tmp_path: Path) -> None:
    rows = [
        {"question": str(i), "answer": "a", "meta": {"lang": lang}}
        for i, lang in enumerate(["py", "c", "py", "python"])
    ]
    source = write(tmp_path / "d.jsonl", rows)

    def asked(*rules: RowFilter) -> list[str]:
        return [e.messages[0]["content"] for e in iter_examples(DataConfig(source, filter=rules))]

    assert asked(RowFilter("meta.lang", equals="py")) == ["0", "2"]
    assert asked(RowFilter("meta.lang", contains="py")) == ["0", "2", "3"]
    assert asked(RowFilter("meta.lang", contains="py"), RowFilter("question", equals="3")) == ["3"]
    assert asked(RowFilter("meta.nothing.deeper", equals="py")) == []
    with pytest.raises(ValueError, match="either `contains` or `equals`"):
        RowFilter("x")
    with pytest.raises(TideError, match="has no examples"):
        scan(DataConfig(source, filter=RowFilter("question", equals="9")))


@given(st.lists(st.text(max_size=3), min_size=1, max_size=60), st.floats(0.05, 0.95))
def test_a_held_out_content_is_never_trained_on_however_often_it_stands_there(
    texts: list[str], share: float
) -> None:
    keys = [parse({"question": "q", "answer": f"{t}."}, DataConfig("d"))[0].id for t in texts]
    sides = [DataConfig("d", split=s, heldout_share=share) for s in ("train", "heldout")]  # type: ignore[arg-type]
    assert all(in_split(key, sides[0]) != in_split(key, sides[1]) for key in keys)


def test_shares_and_weights_are_about_right() -> None:
    keys = [f"{i:024x}" for i in range(4000)]
    heldout = sum(in_split(k, DataConfig("d", split="heldout", heldout_share=0.1)) for k in keys)
    assert 320 < heldout < 480
    for weight in (0.3, 1.0, 2.5):
        total = sum(copies(k, DataConfig("d", weight=weight)) for k in keys)
        assert abs(total / 4000 - weight) < 0.04
