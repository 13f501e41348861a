"""Rows that cannot be used, on their way to a cache."""

from __future__ import annotations

import json
from pathlib import Path

from teacher_cache.build import build_cache
from tests.conftest import files, small_cache_config, write_chats
from tests.teacher_cache.test_build import refused


def test_a_row_that_cannot_be_used_stops_nothing_and_moves_no_other(random_teacher: Path, tmp_path: Path) -> None:
    """Bad rows in a late shard are left out and counted. Removed as advised, nothing is computed again."""
    long = {"messages": [{"role": "user", "content": "w " * 400}, {"role": "assistant", "content": "a"}]}
    source = write_chats(tmp_path / "d.jsonl", [f"x = {i}" for i in range(12)])["source"]
    good = Path(source).read_text().splitlines()
    Path(source).write_text("\n".join([*good[:9], json.dumps(long), "{", *good[9:]]) + "\n")
    config = small_cache_config("tiny-cross", random_teacher, tmp_path / "c", data={"source": source}, shard_examples=4)
    report = build_cache(config)
    assert (report.rows, report.computed) == (24, 6)
    assert any("1 (prompt too long)" in note for note in report.notes)
    assert any("1 (not JSON)" in note for note in report.notes)
    before = files(tmp_path / "c")
    Path(source).write_text("\n".join(good) + "\n")
    assert build_cache(config).computed == 0
    assert files(tmp_path / "c") == before


def test_data_whose_prompts_never_fit(random_teacher: Path, tmp_path: Path) -> None:
    chats = [{"messages": [{"role": "user", "content": "word " * 400}, {"role": "assistant", "content": "a"}]}]
    (tmp_path / "d.jsonl").write_text(json.dumps(chats[0]) + "\n")
    data = {"source": str(tmp_path / "d.jsonl")}
    refused("no example of .* fits", small_cache_config("tiny-cross", random_teacher, tmp_path / "c", data=data))
