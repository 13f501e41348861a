from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import zstandard

from shared.config import DataConfig
from shared.data import example_id, iter_examples, scan
from shared.errors import TideError

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def write_lines(path: Path, rows: list[object]) -> DataConfig:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return DataConfig(source=str(path))


def test_the_three_file_formats_hold_the_same_examples(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"q {i} é\r\n"}, GOOD["messages"][1]]} for i in range(5)]
    plain = write_lines(tmp_path / "d.jsonl", list(rows))
    compressed = tmp_path / "d.jsonl.zst"
    compressed.write_bytes(zstandard.compress((tmp_path / "d.jsonl").read_bytes()))
    pl.DataFrame(rows).write_parquet(tmp_path / "d.parquet")
    summaries = [scan(c) for c in (plain, DataConfig(str(compressed)), DataConfig(str(tmp_path / "d.parquet")))]
    assert len({s.content_hash for s in summaries}) == 1
    assert {s.examples for s in summaries} == {5}


def test_two_named_fields_instead_of_messages(tmp_path: Path) -> None:
    write_lines(tmp_path / "d.jsonl", [{"question": "1+1?", "answer": "2"}])
    config = DataConfig(str(tmp_path / "d.jsonl"), prompt_field="question", response_field="answer")
    (example,) = iter_examples(config)
    assert [m["content"] for m in example.messages] == ["1+1?", "2"]


BAD = [
    ("{", "not JSON"),
    ([1], "the row is a list"),
    ({"text": "x"}, "no `messages` (fields: text)"),
    ({"messages": []}, "not a list with at least one"),
    ({"messages": [{"content": "x"}]}, "message 0 has no `role`"),
    ({"messages": [{"role": "assistant", "content": 3}]}, "the content of message 0 is int"),
    ({"messages": [{"role": "user", "content": "x"}]}, "the last message is from 'user'"),
    ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "lone surrogates"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_malformed_row_stops_with_file_and_line(tmp_path: Path, row: object, reason: str) -> None:
    config = write_lines(tmp_path / "d.jsonl", [GOOD, row, GOOD])
    with pytest.raises(TideError) as error:
        scan(config)
    assert f"{tmp_path}/d.jsonl:2: " in str(error.value)
    assert reason in str(error.value)


def test_all_bad_rows_are_listed_up_to_a_limit(tmp_path: Path) -> None:
    config = write_lines(tmp_path / "d.jsonl", [GOOD, *["{"] * 30])
    with pytest.raises(TideError) as error:
        scan(config)
    assert str(error.value).count("not JSON") == 20
    assert "there may be more" in str(error.value)


def test_allowed_bad_rows_are_reported_and_left_out(tmp_path: Path) -> None:
    write_lines(tmp_path / "d.jsonl", [GOOD, "{", GOOD])
    config = DataConfig(str(tmp_path / "d.jsonl"), allow_bad_rows=1)
    summary = scan(config)
    assert summary.examples == 2
    assert [row.place for row in summary.bad_rows] == [f"{tmp_path}/d.jsonl:2"]
    assert len(list(iter_examples(config))) == 2


def test_bytes_that_are_not_utf8_are_a_malformed_row(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"messages": [{"role": "assistant", "content": "\xff"}]}\n')
    with pytest.raises(TideError, match=r"d.jsonl:2"):
        scan(DataConfig(str(path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "has no examples"),
        ("d.parquet", b"PAR1 broken", "no readable Parquet"),
        ("d.jsonl.zst", b"not zstandard", "no readable zstandard"),
        ("d.csv", b"a,b", "unknown ending"),
    ],
)
def test_unreadable_sources(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TideError, match=message):
        scan(DataConfig(str(tmp_path / name)))


def test_missing_sources() -> None:
    with pytest.raises(TideError, match="there is no data file"):
        scan(DataConfig("/nowhere/d.jsonl"))
    with pytest.raises(TideError, match="unknown split"):
        scan(DataConfig("stdlib:test"))


def test_the_standard_library_splits_are_disjoint_and_fixed() -> None:
    train = [e.id for e in iter_examples(DataConfig("stdlib:train"))]
    heldout = [e.id for e in iter_examples(DataConfig("stdlib:heldout"))]
    assert len(heldout) > 500
    assert len(train) > 10 * len(heldout)
    assert not set(train) & set(heldout)
    assert [e.id for e in iter_examples(DataConfig("stdlib:train", limit=50))] == train[:50]


def test_ids_follow_the_content() -> None:
    assert example_id(GOOD["messages"]) == example_id([dict(m) for m in GOOD["messages"]])
    assert example_id(GOOD["messages"]) != example_id(GOOD["messages"][1:])


def test_a_hub_name_without_network_is_an_explained_error() -> None:
    with pytest.raises(TideError, match="hf://nobody/nothing"):
        scan(DataConfig("hf://nobody/nothing"))
