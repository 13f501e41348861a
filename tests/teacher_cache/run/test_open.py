"""Rows that cannot be used, on their way to a cache."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit
from shared.settings.config import CacheConfig
from teacher_cache.maintenance.verify import check_cache
from teacher_cache.run.build import build_cache
from tests.conftest import STUDENT_TOKENIZER, files, small_cache_config, write_chats
from tests.reading import rows_in


def test_a_row_that_cannot_be_used_stops_nothing_and_moves_no_other(
    random_teacher: Path, tmp_path: Path
) -> None:
    """Bad rows in a late shard are left out and counted. Removed as advised, nothing is computed again."""
    long = {
        "messages": [{"role": "user", "content": "w " * 400}, {"role": "assistant", "content": "a"}]
    }
    source = write_chats(tmp_path / "d.jsonl", [f"x = {i}" for i in range(12)])["source"]
    good = Path(source).read_text().splitlines()
    Path(source).write_text("\n".join([*good[:9], json.dumps(long), "{", *good[9:]]) + "\n")
    config = small_cache_config(
        "tiny-cross", random_teacher, tmp_path / "c", data={"source": source}, shard_examples=4
    )
    report = build_cache(config)
    assert (report.rows, report.computed) == (24, 6)
    assert any("1 (prompt too long)" in note for note in report.notes)
    assert any("1 (not JSON)" in note for note in report.notes)
    before = files(tmp_path / "c")
    Path(source).write_text("\n".join(good) + "\n")
    assert build_cache(config).computed == 0
    assert files(tmp_path / "c") == before


def test_caches_that_differ_in_noise_or_targets_share_what_is_prepared(
    random_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_chats(tmp_path / "d.jsonl", [f"x = {i}" for i in range(16)])

    def config(name: str, **changes: Any) -> CacheConfig:
        return small_cache_config(
            "tiny-cross", random_teacher, tmp_path / name, data=source, **changes
        )

    first = build_cache(config("a"))
    monkeypatch.setattr(
        "teacher_cache.prepared.prepare.source_rows",
        lambda _: pytest.fail("the source was read again"),
    )
    second = build_cache(
        config("b", noise={"seed": 5, "comp_demo": False, "draws": 1}, targets={"k": 4})
    )
    assert (first.rows, second.rows) == (32, 16)
    assert (
        build_cache(config("a", noise={"draws": 3})).computed == 2
    )  # and so does a cache that grows


def test_repeated_rows_make_a_sound_cache_with_masks_of_their_own(
    random_teacher: Path, tmp_path: Path
) -> None:
    source = write_chats(tmp_path / "d.jsonl", ["value = 1 + 2 + 3 + 4"] * 6)
    config = small_cache_config(
        "tiny-cross", random_teacher, tmp_path / "c", data=source, noise={"draws": 1}
    )
    build_cache(config)
    assert not check_cache(config.out).problems
    rows = rows_in(config.out, Unit(0, 0))
    assert len({row.example_id for row in rows}) == 6
    assert len({row.t for row in rows}) == 6


def test_a_cache_keeps_the_day_on_which_it_was_begun(
    random_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Templates of Llama 3.1's kind write today's date: draws of other days must hold the same prompts."""
    student = Path(shutil.copytree(STUDENT_TOKENIZER, tmp_path / "s"))
    template = student / "chat_template.jinja"
    template.write_text("{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + template.read_text())
    source = write_chats(tmp_path / "d.jsonl", ["x = 1", "y = 2"])

    def build(day: int, draws: int, out: str = "c") -> list[list[int]]:
        class Day(datetime.date):
            @classmethod
            def today(cls) -> Day:
                return cls(2026, 11, day)

        monkeypatch.setattr("teacher_cache.run.open.datetime", SimpleNamespace(date=Day))
        changes = {"data": source, "student_tokenizer": str(student), "noise": {"draws": draws}}
        config = small_cache_config("tiny-cross", random_teacher, tmp_path / out, **changes)
        build_cache(config)
        return [
            row.student_ids.tolist()
            for draw in range(draws)
            for row in rows_in(config.out, Unit(draw, 0))
        ]

    (first, second) = build(25, 1)
    assert build(26, 2) == [first, second, first, second]
    assert load_manifest(tmp_path / "c").fingerprint.data.date == "2026-11-25"
    assert build(26, 1, "other") != [first, second]  # a new cache is of its own day
