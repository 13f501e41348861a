"""Kinds of files, and rows that are none: each with its place; nothing that is cut short passes for a whole."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pyarrow as pa
import pytest
import zstandard

from shared.data import content_key, files, iter_examples, scan
from shared.data.stdlib_corpus import iter_stdlib_functions
from shared.settings.config import DataConfig
from shared.system.errors import TideError

GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
ROWS = [
    {"messages": [{"role": "user", "content": f"q {i} é\r\n"}, GOOD["messages"][1]]}
    for i in range(5)
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def write_lines(path: Path, rows: list[object]) -> DataConfig:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return DataConfig(source=str(path), allow_bad_rows=0)


def arrow(path: Path, stream: bool) -> None:
    table = pa.Table.from_pylist(ROWS)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "d.jsonl": lambda p: p.write_bytes(LINES),
    "d.ndjson": lambda p: p.write_bytes(LINES.rstrip(b"\n")),
    "crlf.jsonl": lambda p: p.write_bytes(LINES.replace(b"}\n", b"}\r\n")),
    "bom.jsonl": lambda p: p.write_bytes(b"\xef\xbb\xbf" + LINES),
    "lines.json": lambda p: p.write_bytes(LINES),
    "array.json": lambda p: p.write_text(json.dumps(ROWS)),
    "pretty.json": lambda p: p.write_text("\ufeff" + json.dumps(ROWS, indent=2), encoding="utf-8"),
    "array.jsonl": lambda p: p.write_text(json.dumps(ROWS)),
    "d.jsonl.gz": lambda p: p.write_bytes(gzip.compress(LINES)),
    "two.jsonl.gz": lambda p: p.write_bytes(gzip.compress(LINES[:99]) + gzip.compress(LINES[99:])),
    "d.jsonl.bz2": lambda p: p.write_bytes(bz2.compress(LINES)),
    "d.jsonl.xz": lambda p: p.write_bytes(lzma.compress(LINES)),
    "d.jsonl.zst": lambda p: p.write_bytes(zstandard.compress(LINES)),
    "two.jsonl.zst": lambda p: p.write_bytes(
        zstandard.compress(LINES[:99]) + zstandard.compress(LINES[99:])
    ),
    "array.json.zst": lambda p: p.write_bytes(zstandard.compress(json.dumps(ROWS).encode())),
    "d.parquet": lambda p: pl.DataFrame(ROWS).write_parquet(p),
    "stream.arrow": lambda p: arrow(p, True),
    "file.arrow": lambda p: arrow(p, False),
    "folder": lambda p: (
        p.mkdir(),
        (p / "a.jsonl").write_bytes(LINES[:0]),
        (p / "b.jsonl").write_bytes(LINES),
    ),
    "saved": lambda p: datasets.Dataset.from_list(ROWS).save_to_disk(str(p)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_holds_the_same_examples(name: str, tmp_path: Path) -> None:
    (tmp_path / "plain.jsonl").write_bytes(LINES)
    WRITERS[name](tmp_path / name)
    expected = scan(DataConfig(str(tmp_path / "plain.jsonl")))
    found = scan(DataConfig(str(tmp_path / name)))
    assert (found.examples, found.content_hash, found.bad_rows) == (5, expected.content_hash, ())


def test_a_glob_reads_its_files_in_order(tmp_path: Path) -> None:
    for i, row in enumerate(ROWS):
        write_lines(tmp_path / f"part-{i}.jsonl", [row])
    found = list(iter_examples(DataConfig(str(tmp_path / "part-*.jsonl"))))
    assert [e.messages[0]["content"] for e in found] == [r["messages"][0]["content"] for r in ROWS]


def test_lines_that_hold_lists_are_judged_one_by_one_and_the_file_is_read_once_or_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n[1]\n" * 200 + json.dumps(GOOD) + "\n")
    reads: list[Path] = []
    blocks = files._blocks
    monkeypatch.setattr(files, "_blocks", lambda p: (reads.append(p), blocks(p))[1])
    summary = scan(DataConfig(str(path), allow_bad_rows=200))
    assert (summary.examples, len(summary.bad_rows), summary.bad_rows[0].place) == (
        1,
        200,
        f"{path}:2",
    )
    assert len(reads) <= 2


def test_csv_with_named_fields(tmp_path: Path) -> None:
    with (tmp_path / "d.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows([["ask", "say"], ["1+1?", 'two,\n"2"'], ["2+2?", "4"]])
    config = DataConfig(str(tmp_path / "d.csv"), prompt_field="ask", response_field="say")
    assert [e.messages[1]["content"] for e in iter_examples(config)] == ['two,\n"2"', "4"]


def test_a_line_ends_at_a_line_feed_and_nowhere_else(tmp_path: Path) -> None:
    text = "first\u2028second\u0085third\x0cfourth\x1dfifth"
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    (example,) = iter_examples(DataConfig(str(tmp_path / "d.jsonl")))
    assert example.messages[1]["content"] == text


@pytest.mark.parametrize("kind", ["gz", "zst", "xz", "bz2"])
@pytest.mark.parametrize("allowed", [0, 3, 0.5])
def test_a_file_that_is_cut_short_is_an_error_whatever_is_allowed(
    kind: str, allowed: float, tmp_path: Path
) -> None:
    lines = b"".join(
        json.dumps({**GOOD, "x": os.urandom(2000).hex()}).encode() + b"\n" for _ in range(300)
    )
    pack: Any = {
        "gz": gzip.compress,
        "zst": zstandard.compress,
        "xz": lzma.compress,
        "bz2": bz2.compress,
    }[kind]
    whole = pack(lines)
    path = tmp_path / f"d.jsonl.{kind}"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TideError, match="cannot be read to its end"):
        scan(DataConfig(str(path), allow_bad_rows=allowed))


DEEP = "[" * 100_000
BAD = [
    ("{", "not JSON"),
    (f'{{"messages": {DEEP}', "nested too deeply"),
    (f'{{"n": {"7" * 5000}}}', "not JSON"),
    ([1], "the row is a list"),
    (
        {"text": "x"},
        "no conversation in the fields 'text': set data.prompt_field and data.response_field",
    ),
    ({"messages": []}, "not a list with at least one"),
    ({"messages": [{"content": "x"}]}, "message 0 has no `role`"),
    ({"messages": [{"role": "assistant", "content": 3}]}, "the content of message 0 is int"),
    (
        {"messages": [{"role": "assistant", "content": None}]},
        "the content of message 0 is NoneType",
    ),
    ({"messages": [{"role": "user", "content": "x"}]}, "no message is from the assistant"),
    ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "lone surrogates"),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "image"}]}]},
        "a part that is no text",
    ),
    (
        {"messages": [{"role": "user", "content": "x" * 4_000_000}, GOOD["messages"][1]]},
        "characters",
    ),
    ({"messages": [GOOD["messages"][1]], "tools": "{"}, "`tools` is a text that is no JSON"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_row_that_is_no_conversation_stops_with_file_and_line(
    tmp_path: Path, row: object, reason: str
) -> None:
    config = write_lines(tmp_path / "d.jsonl", [GOOD, row, GOOD])
    with pytest.raises(TideError) as error:
        scan(config)
    assert f"{tmp_path}/d.jsonl:2: " in str(error.value)
    assert reason in str(error.value)
    summary = scan(DataConfig(config.source, allow_bad_rows=1))
    assert (summary.examples, [bad.place for bad in summary.bad_rows]) == (
        2,
        [f"{tmp_path}/d.jsonl:2"],
    )
    assert len(list(iter_examples(config))) == 2


def test_how_many_bad_rows_are_allowed(tmp_path: Path) -> None:
    config = write_lines(tmp_path / "d.jsonl", [*[GOOD] * 285, *["{"] * 15])
    with pytest.raises(TideError, match="15 of 300 rows"):
        scan(config)
    for allowed in (15, 0.05, 0.1):
        assert scan(DataConfig(config.source, allow_bad_rows=allowed)).examples == 285
    for allowed, words in (
        (0.04, "12 are allowed"),
        (0.001, "10 are allowed"),
        (14, "14 are allowed"),
    ):
        with pytest.raises(TideError, match=words):
            scan(DataConfig(config.source, allow_bad_rows=allowed))
    few = write_lines(
        tmp_path / "few.jsonl", [GOOD, "{", "{"]
    )  # a share of three rows would be none
    assert scan(DataConfig(few.source)).examples == 1


def test_bad_rows_are_listed_up_to_a_limit(tmp_path: Path) -> None:
    with pytest.raises(TideError) as error:
        scan(write_lines(tmp_path / "d.jsonl", [GOOD, *["{"] * 30]))
    assert str(error.value).count("not JSON") == 20
    assert "…" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "has no examples"),
        ("d.parquet", b"PAR1 broken", "no readable Parquet"),
        ("d.arrow", b"broken", "no readable Arrow"),
        ("d.jsonl.zst", b"not zstandard", "cannot be read to its end"),
        ("d.jsonl.gz", b"not gzip", "cannot be read to its end"),
        ("d.txt", b"a,b", "unknown ending"),
        (
            "d.json",
            b'{"version": 1,\n "data": []}',
            "one JSON object with the fields version, data",
        ),
        ("d.json", b'[{"messages": 1},\n', "no JSON array"),
    ],
)
def test_unreadable_sources(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TideError, match=message):
        scan(DataConfig(str(tmp_path / name)))


def test_missing_sources(tmp_path: Path) -> None:
    for source, message in [
        ("/nowhere/d.jsonl", "there is no data file"),
        (str(tmp_path / "*.jsonl"), "there is no data file"),
        (str(tmp_path), "holds no data files"),
        ("stdlib:test", "unknown split"),
        ("hf://a:b:c:d", "names no data set"),
    ]:
        with pytest.raises(TideError, match=message):
            scan(DataConfig(source))


def test_the_standard_library_splits_are_disjoint_and_fixed() -> None:
    train, heldout = (list(iter_stdlib_functions(split)) for split in ("train", "heldout"))
    assert len(heldout) > 500
    assert len(train) > 10 * len(heldout)
    assert not {f.source for f in train} & {f.source for f in heldout}
    for split, functions in (("train", train), ("heldout", heldout)):
        first = list(iter_examples(DataConfig(f"stdlib:{split}", limit=50)))
        assert [list(e.messages) for e in first] == [f.messages() for f in functions[:50]]


def test_ids_follow_the_content_and_the_occurrence_never_the_rows_own_id(tmp_path: Path) -> None:
    assert content_key(GOOD["messages"]) == content_key([dict(m) for m in GOOD["messages"]])
    assert content_key(GOOD["messages"]) != content_key(GOOD["messages"][1:])
    rows = [{**row, "id": 0} for row in ROWS] + [{**ROWS[1], "id": 7}]
    found = list(iter_examples(write_lines(tmp_path / "d.jsonl", list(rows))))
    assert len({e.id for e in found}) == 6
    assert found[5].id == f"{found[1].id}#1"
    assert [e.label for e in found] == ["0"] * 5 + ["7"]


def hub_folder(folder: Path, configs: dict[str, list[dict[str, Any]]]) -> Path:
    """A data set in the hub's layout, with a configuration for each name."""
    lines = ["---", "configs:"]
    for name, rows in configs.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines += [f"- config_name: {name}", f"  data_files: {name}/train.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def test_a_configuration_of_a_hub_data_set_can_be_named(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "set", {"one": ROWS[:1], "two": ROWS})
    with pytest.raises(TideError, match=r"2 configurations and no default: one, two"):
        scan(DataConfig(f"hf://{folder}"))
    for name, examples in (
        (f"{folder}:one", 1),
        (f"{folder}:two:train", 5),
        (f"{folder}:two#train", 5),
        (f"{folder}:two#train[:80%]", 4),
        (f"{folder}:two#train[2:3]", 1),
    ):
        assert scan(DataConfig(f"hf://{name}")).examples == examples, name


def test_splits_of_a_saved_data_set(tmp_path: Path) -> None:
    parts = datasets.DatasetDict(
        {n: datasets.Dataset.from_list(ROWS[:i]) for i, n in ((2, "train"), (1, "test"))}
    )
    parts.save_to_disk(str(tmp_path / "d"))
    assert scan(DataConfig(f"{tmp_path}/d#train")).examples == 2
    with pytest.raises(TideError, match="splits train, test"):
        scan(DataConfig(f"{tmp_path}/d"))


def test_a_hub_name_without_network_is_an_explained_error() -> None:
    with pytest.raises(TideError, match="hf://nobody/nothing"):
        scan(DataConfig("hf://nobody/nothing"))
