"""What a run begins with: settings, teacher, student and data, and the cache that is there."""

import datetime
import json
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from pipelines.recipes.read import cache_config
from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit
from shared.settings.config import CacheConfig
from shared.system.files import TideError
from teacher_cache.maintenance.verify import check_cache
from teacher_cache.run.build import build_cache
from teacher_cache.run.preflight import settle_engine
from tests.conftest import STUDENT_TOKENIZER, chats_file, files, small_cache_config, write_chats
from tests.reading import rows_in


def test_what_changed(caches: dict[str, Path], random_teacher: Path, tmp_path: Path) -> None:
    """Between two runs: it is named, and nothing is touched."""
    cache = Path(shutil.copytree(caches["tiny-cross"], tmp_path / "cache"))
    text, other = chats_file().read_text().splitlines(), tmp_path / "other.jsonl"
    other.write_text("\n".join([text[1], *text[1:]]) + "\n")
    reworded, moved = (Path(shutil.copytree(random_teacher, tmp_path / n)) for n in ("r", "m"))
    template, weights = reworded / "chat_template.jinja", moved / "model.safetensors"
    template.write_text("{# new #}" + template.read_text())
    tensors = {name: value + 1e-3 for name, value in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    for named, model, changes in (
        ("data.content", random_teacher, {"data": {"source": str(other), "limit": 24}}),
        ("teacher.template", reworded, {}),
        ("teacher.template", random_teacher, {"teacher_chat_template": str(template)}),
        ("teacher.weights", moved, {}),
        ("targets.k", random_teacher, {"targets": {"k": 4, "rank": 6, "pilot": 200}}),
    ):
        with pytest.raises(TideError, match=named):
            build_cache(small_cache_config("tiny-cross", model, cache, **changes))
        assert files(cache) == files(caches["tiny-cross"])


def test_bad_input(random_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before the teacher is loaded."""
    never = "teacher_cache.run.build.load_engine"
    monkeypatch.setattr(never, lambda _run: pytest.fail("the teacher was loaded"))
    source = tmp_path / "empty.jsonl"
    source.write_text("\n")
    for named, teacher, changes in (
        ("'tiny'", "tiny", {}),
        ("4097", "tiny-shared", {"targets": {"k": 4097}}),
        ("empty.jsonl", "tiny-shared", {"data": {"source": str(source)}}),
        ("tokens", "tiny-shared", {"student_tokenizer": str(STUDENT_TOKENIZER)}),
        ("512", "tiny-shared", {"lengths": {"student": 640, "teacher": 640}}),
        # What settings allow, and a manifest does not.
        ("step", "tiny-shared", {"targets": {"step": 200.0}}),
        ("rank", "tiny-shared", {"targets": {"rank": 1 << 15}}),
        ("temperatures", "tiny-cross", {"targets": {"temperatures": range(1, 70)}}),
    ):
        with pytest.raises(TideError, match=named):
            build_cache(small_cache_config(teacher, random_teacher, tmp_path / "c", **changes))
    for name, value in (("mask_token_id", 7), ("vocab_size", 4090)):
        model = Path(shutil.copytree(random_teacher, tmp_path / name))
        values = {**json.loads((model / "config.json").read_text()), name: value}
        (model / "config.json").write_text(json.dumps(values))
        with pytest.raises(TideError, match=str(value)):
            build_cache(small_cache_config("tiny-shared", model, tmp_path / "c"))


def test_auto_takes_vllm_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(teacher: str, *settings: str) -> str:
        return settle_engine(cache_config(teacher, None, [*settings])).engine.type

    fits, not_there = "llada2-mini", "wedlm-8b"
    there = ModuleType("vllm")
    there.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", there)
    assert settle(fits, "engine.type=auto") == "vllm"
    assert settle(not_there, "engine.type=auto") == "transformers"
    with pytest.raises(TideError):
        settle(not_there, "engine.type=vllm")
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert settle(fits, "engine.type=auto") == settle(fits) == "transformers"
    for refused in ("engine.type=vllm", "engine.tensor_parallel=2"):
        with pytest.raises(TideError):
            settle(fits, refused)


def test_caches_that_differ_in_noise_or_targets_share_what_is_prepared(
    random_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated rows among it, which have masks of their own, and one that is left out."""
    source = write_chats(tmp_path / "d.jsonl", [f"x = {i // 2}" for i in range(16)])
    with Path(source["source"]).open("a") as file:
        file.write("{")

    def config(name: str, **changes: Any) -> CacheConfig:
        changes["data"] = source
        return small_cache_config("tiny-cross", random_teacher, tmp_path / name, **changes)

    first = build_cache(config("a"))
    assert "not JSON" in first.notes[0]
    assert not check_cache(tmp_path / "a").problems
    rows = rows_in(tmp_path / "a", Unit(0, 0))
    assert len({row.example_id for row in rows}) == len({row.t for row in rows}) == 8
    again = "teacher_cache.prepared.prepare.source_rows"
    monkeypatch.setattr(again, lambda _: pytest.fail("the source was read again"))
    noise = {"seed": 5, "comp_demo": False, "draws": 1}
    second = build_cache(config("b", noise=noise, targets={"k": 4}))
    assert (first.rows, second.rows) == (32, 16)
    assert build_cache(config("a", noise={"draws": 3})).computed == 2  # a cache that grows, too


def test_a_cache_keeps_the_day_on_which_it_was_begun(
    random_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Templates of Llama 3.1's kind write today's date: all draws must hold the same prompts."""
    template, own = (
        tmp_path / "today.jinja",
        (STUDENT_TOKENIZER / "chat_template.jinja").read_text(),
    )
    template.write_text("{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + own)
    source = write_chats(tmp_path / "d.jsonl", ["x = 1", "y = 2"])

    def build(day: int, draws: int, out: str = "c") -> list[list[int]]:
        class Day(datetime.date):
            @classmethod
            def today(cls) -> datetime.date:
                return cls(2026, 11, day)

        monkeypatch.setattr("teacher_cache.run.open.datetime", SimpleNamespace(date=Day))
        changes = {"data": source, "noise": {"draws": draws}}
        changes |= {"student_chat_template": str(template)}
        config = small_cache_config("tiny-cross", random_teacher, tmp_path / out, **changes)
        build_cache(config)
        rows = [row for draw in range(draws) for row in rows_in(config.out, Unit(draw, 0))]
        return [row.student_ids.tolist() for row in rows]

    first, second = build(25, 1)
    assert build(26, 2) == [first, second, first, second]
    assert load_manifest(tmp_path / "c").fingerprint.data.date == "2026-11-25"
    assert build(26, 1, "other") != [first, second]  # a new cache is of its own day
