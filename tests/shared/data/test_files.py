"""Kinds of files, and rows that are none: each with its place; a part is never the whole."""

import bz2
import csv
import gzip
import json
import lzma
import os
import struct
import tracemalloc
from collections.abc import Callable
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pyarrow as pa
import pytest
import zstandard

from pipelines.recipes.read import cache_config, packaged_recipe
from shared.data.conversation import content_key
from shared.data.reading import iter_examples, scan
from shared.data.sources import parse_hub_name
from shared.data.stdlib_corpus import iter_stdlib_functions
from shared.settings.config import DataConfig
from shared.system.files import TideError
from teacher_cache.prepared.folder import describe
from teacher_cache.run.build import build_cache
from teacher_cache.run.open import open_sides, prepare_data
from tests.reading import all_rows

ANSWER = {"role": "assistant", "content": "a"}
GOOD = {"messages": [{"role": "user", "content": "q"}, ANSWER]}
QUESTIONS = [{"role": "user", "content": f"q {i} é\r\n\u2028\u0085\x0c\x1d"} for i in range(5)]
ROWS = [{"messages": [question, ANSWER]} for question in QUESTIONS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ZSTD = zstandard.compress


def write_lines(path: Path, rows: list[Any]) -> DataConfig:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return DataConfig(source=str(path), allow_bad_rows=0.0)


def arrow(path: Path, writer: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(ROWS)
    with writer(str(path), table.schema) as file:
        file.write_table(table)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "d.ndjson": lambda p: p.write_bytes(LINES.rstrip(b"\n")),
    "crlf.jsonl": lambda p: p.write_bytes(LINES.replace(b"}\n", b"}\r\n")),
    "bom.jsonl": lambda p: p.write_bytes(b"\xef\xbb\xbf" + LINES),
    "lines.json": lambda p: p.write_bytes(LINES),
    "pretty.json": lambda p: p.write_text("\ufeff" + json.dumps(ROWS, indent=2), encoding="utf-8"),
    "array.jsonl": lambda p: p.write_text(json.dumps(ROWS)),
    "array.json.zst": lambda p: p.write_bytes(ZSTD(json.dumps(ROWS).encode())),
    "two.jsonl.gz": lambda p: p.write_bytes(gzip.compress(LINES[:99]) + gzip.compress(LINES[99:])),
    "two.jsonl.zst": lambda p: p.write_bytes(ZSTD(LINES[:99]) + ZSTD(LINES[99:])),
    "d.jsonl.bz2": lambda p: p.write_bytes(bz2.compress(LINES)),
    "d.jsonl.xz": lambda p: p.write_bytes(lzma.compress(LINES)),
    "d.parquet": lambda p: pl.DataFrame(ROWS).write_parquet(p),
    "stream.arrow": lambda p: arrow(p, pa.ipc.new_stream),
    "file.arrow": lambda p: arrow(p, pa.ipc.new_file),
    "folder": lambda p: (p.mkdir(), write_lines(p / "b.jsonl", ROWS)),
    "saved": lambda p: datasets.Dataset.from_list(ROWS).save_to_disk(str(p)),
}


def test_every_kind_of_file_holds_the_same_examples(tmp_path: Path) -> None:
    expected, _ = scan(write_lines(tmp_path / "plain.jsonl", ROWS))
    assert len(expected) == 5
    for i, row in enumerate(ROWS):
        write_lines(tmp_path / f"part-{i}.jsonl", [row])
    for name, write in WRITERS.items():
        write(tmp_path / name)
    for name in [*WRITERS, "part-*.jsonl"]:
        examples, _ = scan(DataConfig(str(tmp_path / name), allow_bad_rows=0.0))
        assert examples == expected, name


def test_csv_with_named_fields(tmp_path: Path) -> None:
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["ask", "say"], ["1+1?", 'two,\r\n"2"'], ["2+2?", "4"]])
    (tmp_path / "old.tsv").write_bytes(b"ask\tsay\r1+1?\t2\r2+2?\t4\r")
    for name, answers in (("d.csv", ['two,\r\n"2"', "4"]), ("old.tsv", ["2", "4"])):
        config = DataConfig(str(tmp_path / name), prompt_field="ask", response_field="say")
        assert [e.messages[1]["content"] for e in iter_examples(config)] == answers


def test_a_file_that_is_cut_short_is_an_error_whatever_is_allowed(tmp_path: Path) -> None:
    rows = [json.dumps({**GOOD, "x": os.urandom(2000).hex()}).encode() for _ in range(300)]
    packers: dict[str, Any] = {"gz": gzip, "zst": zstandard, "xz": lzma, "bz2": bz2}
    for kind, library in packers.items():
        whole = library.compress(b"\n".join(rows))
        path = tmp_path / f"d.jsonl.{kind}"
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(TideError):
            scan(DataConfig(str(path), allow_bad_rows=300.0))


def test_a_row_that_is_no_conversation_stops_with_file_and_line(tmp_path: Path) -> None:
    contents = (3, None, [{"type": "image"}])
    history = {"instruction": "q", "output": "a", "history": 3}
    bad: dict[str, list[Any]] = {
        "not JSON": ["{", f'{{"messages": {"[" * 100_000}', f'{{"n": {"7" * 5000}}}'],
        "no known form": [[1], {"text": "x"}],
        "not in its form": [{"messages": []}, {"messages": [ANSWER], "tools": "{"}, history],
        "no role": [{"messages": [{"content": "x"}]}],
        "content is no text": [{"messages": [{**ANSWER, "content": c}]} for c in contents],
        "no answer": [{"messages": [{"role": "user", "content": "x"}]}],
        "lone surrogates": ['{"messages": [{"role": "assistant", "content": "\\ud800"}]}'],
        "too large": [{"messages": [{"role": "user", "content": "x" * 2_000_000}, ANSWER]}],
    }
    rows = [(reason, row) for reason, kinds in bad.items() for row in kinds]
    config = write_lines(tmp_path / "d.jsonl", [GOOD, *(row for _, row in rows), GOOD])
    with pytest.raises(TideError) as error:
        scan(config)
    examples, bad_rows = scan(DataConfig(config.source, allow_bad_rows=99.0))
    assert len(examples) == 2
    places = [(reason, f"{tmp_path}/d.jsonl:{i}") for i, (reason, _) in enumerate(rows, 2)]
    assert [(why.reason, place) for place, why in bad_rows] == places
    assert all(place in str(error.value) for _, place in places)


def test_how_many_bad_rows_are_allowed(tmp_path: Path) -> None:
    config = write_lines(tmp_path / "d.jsonl", [*[GOOD] * 285, *["{"] * 15])
    for allowed in (15.0, 0.05, 0.1):
        assert len(scan(DataConfig(config.source, allow_bad_rows=allowed))[0]) == 285
    for allowed in (0.0, 0.04, 0.001, 14.0):
        with pytest.raises(TideError):
            scan(DataConfig(config.source, allow_bad_rows=allowed))
    # A share of three rows would be none.
    few = write_lines(tmp_path / "few.jsonl", [GOOD, "{", "{"])
    assert len(scan(DataConfig(few.source))[0]) == 1


def test_unreadable_and_missing_sources(tmp_path: Path) -> None:
    contents = {
        "d.jsonl": b"", "d.parquet": b"PAR1 broken", "d.arrow": b"broken", "d.txt": b"a,b",
        "d.jsonl.zst": b"not zstandard", "d.jsonl.gz": b"not gzip",
        "object.json": b'{"version": 1,\n "data": []}', "open.json": b'[{"messages": 1},\n',
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "empty").mkdir()
    names = [str(tmp_path / name) for name in [*contents, "absent.jsonl", "*.csv", "empty"]]
    for source in [*names, "stdlib:test", "hf://a:b:c:d", "hf://nobody/nothing"]:
        with pytest.raises(TideError) as error:
            scan(DataConfig(source))
        assert source.removeprefix("hf://") in str(error.value)


def test_the_standard_library_splits_are_disjoint_and_fixed() -> None:
    functions = list(islice(iter_stdlib_functions("all"), 1600))
    heldout = list(islice(iter_stdlib_functions("heldout"), 60))
    assert heldout == [f for f in functions if f in heldout]
    train = [f for f in functions if f not in heldout][:50]
    examples = iter_examples(DataConfig("stdlib:train", limit=50))
    assert [list(e.messages) for e in examples] == [messages for _, messages in train]


def test_ids_follow_the_content_and_the_occurrence_never_the_rows_own_id(tmp_path: Path) -> None:
    assert content_key(GOOD["messages"]) == content_key([dict(m) for m in GOOD["messages"]])
    rows = [{**row, "id": 0} for row in ROWS] + [{**ROWS[1], "id": 7}]
    found = list(iter_examples(write_lines(tmp_path / "d.jsonl", rows)))
    assert len({e.id for e in found}) == 6
    assert found[5].id == f"{found[1].id}#1"
    assert [e.label for e in found] == ["0"] * 5 + ["7"]


def hub_folder(folder: Path, configs: dict[str, list[dict[str, Any]]]) -> Path:
    """A data set in the hub's layout, with a configuration for each name."""
    lines = ["---", "configs:"]
    for name, rows in configs.items():
        (folder / name).mkdir(parents=True)
        write_lines(folder / name / "train.jsonl", rows)
        lines += [f"- config_name: {name}", f"  data_files: {name}/train.jsonl"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def test_a_folder_is_read_without_what_is_none_of_its_data(tmp_path: Path) -> None:
    """Of programs, of other systems, of ours; a link to a folder is read once, one to itself not
    at all.
    """
    (folder := tmp_path / "data").mkdir()
    (tmp_path / "beside").mkdir()
    write_lines(folder / "a.jsonl", ROWS[:3])
    write_lines(tmp_path / "beside" / "b.jsonl", ROWS[3:])
    expected = iter_ids(str(folder))
    strange = {"._a.parquet": b"Mac OS X", ".DS_Store": b"\0", "state.txt": b"x",
               ".ipynb_checkpoints/a.jsonl": LINES, "__MACOSX/a.jsonl": LINES,
               "cache/manifest.json": b"{}", "cache/shards/draw=00/part-00000.parquet": b"PAR1",
               "prepared/parts/x.parquet": b"PAR1", "prepared/.lock": b"",
               "dataset_infos.json": b'{"default":\n{}}', "config.json": b"{}",
               "saved/dataset_info.json": b"{}", "saved/state.json": b"{}",
               "saved/cache-0f.arrow": b"ARROW1", "notes.txt.zst": b"x",
               "run/run.json": b"{}", "run/model/config.json": b"{}"}  # fmt: skip
    for name, content in strange.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name in ("one", "two"):
        (folder / name).symlink_to(folder)
    (folder / "again.jsonl").symlink_to(folder / "a.jsonl")
    for source in (folder, folder / "**" / "*.jsonl", folder / "**"):
        assert iter_ids(str(source)) == expected, source
    (folder / "more").symlink_to(tmp_path / "beside")
    assert len(iter_ids(str(folder))) == 5
    # A file that holds one object is one row.
    (folder / "info.json").write_text('{"version": 1,\n "about": []}')
    (folder / "one.json").write_text(json.dumps(GOOD, indent=1))
    examples, bad = scan(DataConfig(str(folder)))
    assert len(examples) == 6 and ["info.json" in place for place, _ in bad] == [True]


def iter_ids(source: str) -> list[str]:
    return [example.id for example in scan(DataConfig(source, allow_bad_rows=0.0))[0]]


LONG = 'q 9,"' + "x" * (1 << 24)


@pytest.mark.parametrize("line", ['q 9,"a quote that opens', '"q" 9,a', "q 9,a, and more", LONG])
def test_a_damaged_line_of_csv_is_an_error_never_fewer_rows(tmp_path: Path, line: str) -> None:
    (tmp_path / "twice.csv").write_text("question,answer,answer\nq,a,b\n")
    with pytest.raises(TideError):
        scan(DataConfig(str(tmp_path / "twice.csv")))
    lines = ["question,answer", *(f"q {i},a {i}" for i in range(30))]
    lines[10] = line
    (tmp_path / "d.csv").write_text("\n".join(lines))
    with pytest.raises(TideError, match=r"line 1[01]"):
        scan(DataConfig(str(tmp_path / "d.csv"), allow_bad_rows=30.0))


@pytest.mark.parametrize("kind", ["line", "array"])
def test_a_small_file_that_unpacks_to_a_large_one_costs_little(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"d.{'jsonl' if kind == 'line' else 'json'}.zst"
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as writer:
        writer.write(b'[\n"' if kind == "array" else LINES[: LINES.index(b"\n") + 1])
        for _ in range(256):
            writer.write(bytes(1 << 20))
        writer.write(b'"]' if kind == "array" else b"\n" + LINES[LINES.index(b"\n") + 1 :])
    tracemalloc.start()
    try:
        if kind == "array":
            with pytest.raises(TideError):
                scan(DataConfig(str(path)))
        else:
            examples, bad = scan(DataConfig(str(path)))
            assert len(examples) == 5 and [why.reason for _, why in bad] == ["too large"]
        assert tracemalloc.get_traced_memory()[1] < 128 << 20
    finally:
        tracemalloc.stop()


def test_a_table_with_flipped_bits_is_an_error_of_its_own(tmp_path: Path) -> None:
    """Whatever becomes of the process that reads it, and whatever comes in as text."""
    rows = pa.table({"prompt": [f"q {i}" for i in range(300)], "completion": ["a"] * 300})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, rows.schema) as file:
        file.write_table(rows)
    whole = sink.getvalue().to_pybytes()
    offsets = whole.index(rows.column(0).chunk(0).buffers()[1].to_pybytes()[:1200])
    for at, offset in ((300, 2**31 - 1), (150, 10**8), (150, -5), (300, 3000)):
        content = bytearray(whole)
        struct.pack_into("<i", content, offsets + 4 * at, offset)
        (tmp_path / "d.arrow").write_bytes(content)
        with pytest.raises(TideError, match=r"d\.arrow"):
            scan(DataConfig(str(tmp_path / "d.arrow")))


def test_configurations_and_splits_of_data_sets(tmp_path: Path) -> None:
    hub = f"hf://{hub_folder(tmp_path / 'set', {'one': ROWS[:1], 'two': ROWS})}"
    parts = {name: datasets.Dataset.from_list(ROWS[:n]) for name, n in (("train", 2), ("test", 5))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))  # type: ignore[arg-type]
    for source in (hub, f"{tmp_path}/saved"):
        with pytest.raises(TideError):  # which one?
            scan(DataConfig(source))
    sizes = {":one": 1, ":two:train": 5, ":two#train[:80%]": 4, ":two#train[2:3]": 1, ":*": 6}
    sizes = {hub + part: size for part, size in sizes.items()} | {f"{tmp_path}/saved#train": 2}
    for source, examples in sizes.items():
        assert len(scan(DataConfig(source))[0]) == examples, source


def test_the_recipe_from_four_layouts_to_a_cache(random_teacher: Path, tmp_path: Path) -> None:
    """The paper's four sources, in their own layouts; rows made up."""
    turn = ["user", "assistant"]

    def chats(name: str, roles: list[str]) -> list[dict[str, Any]]:
        texts = ([{"role": r, "content": f"{name} {i} {r}"} for r in roles] for i in range(40))
        return [{"id": f"{name}_{i}", "messages": text} for i, text in enumerate(texts)]

    smol = {"all": chats("smoltalk", ["system", *turn, *turn]), "other": chats("no", turn)}
    sets = [("tulu", {"default": chats("tulu", turn)}, ""), ("smoltalk", smol, ":all")]
    for name in ("one", "two"):
        code = (f"```{('rust', 'python')[i % 2]}\nx = {i}\n```" for i in range(40))
        rows = [
            {"instruction": f"{name} {i}", "output": c, "code": "x"} for i, c in enumerate(code)
        ]
        sets.append((name, {"a": rows[:20], "b": rows[20:]}, ":*"))
    sources = [f"hf://{hub_folder(tmp_path / n, rows)}{c}#train[:95%]" for n, rows, c in sets]
    changes = [f"data.{i}.source={json.dumps(source)}" for i, source in enumerate(sources)]
    changes += ["lengths={student=128, teacher=128}", "noise.draws=1", "targets.k=8"]
    changes += ['engine={dtype="float32", device="cpu"}', "shard_examples=16"]
    changes += ['targets.signals=["topk","chunks"]']
    flags = {"model": str(random_teacher), "out": tmp_path / "cache"}
    config = cache_config("tiny-cross", packaged_recipe("cross"), changes, **flags)
    assert [source.source for source in config.sources] == sources
    data, _ = prepare_data(config, open_sides(config))
    taken = [(source.rows, source.filtered, source.taken) for source in data.record.sources]
    assert taken == [(38, 0, 38), (38, 0, 38), (38, 20, 18), (38, 20, 18)]
    assert "smoltalk:all#train[:95%]" in describe(data)
    assert build_cache(config).rows == data.examples == 112
    labels = [row.label for row in all_rows(config.out)]
    assert {label for label in labels if "tulu" in label} == {f"tulu_{i}" for i in range(38)}
    assert 8 <= sum("tulu" in label for label in labels[:30]) <= 12  # interleaved: a third


def test_every_source_of_the_recipes_is_well_formed() -> None:
    for kind in ("llada-8b", "wedlm-8b"):
        sources = [source.source for source in cache_config(kind, None, []).sources]
        names = [parse_hub_name(source.removeprefix("hf://")) for source in sources]
        opc_sets = [f"OpenCoder-LLM/opc-sft-stage{n}" for n in (1, 2)]
        chats = ["allenai/tulu-3-sft-mixture", "HuggingFaceTB/smoltalk"]
        assert [name for name, _, _ in names] == chats + opc_sets
        assert {split for _, _, split in names} == {"train[:95%]"}
        own = cache_config(kind, None, [], changes={"data": {"source": "chats.jsonl"}})
        assert [source.source for source in own.sources] == ["chats.jsonl"]


@pytest.mark.slow
def test_parts_of_the_library_share_no_module() -> None:
    parts = ("half-a", "half-b", "half-b-tune", "half-b-test")
    sizes = {part: 2500 if part == "half-b" else 40 for part in parts}
    found = {part: [*islice(iter_stdlib_functions(part), n)] for part, n in sizes.items()}
    modules = {
        part: {name.split(":")[0].split(".")[0] for name, _ in found[part]} for part in parts
    }
    for one, other in combinations(parts, 2):
        assert modules[one] and not modules[one] & modules[other]
    again = [name for name, _ in iter_stdlib_functions("half-b#1")]
    names = [name for name, _ in found["half-b"]]
    assert again != names and sorted(again) == sorted(names)
