"""The paper's four sources, in their own layouts, from the recipe to a cache; rows made up."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.recipes.read import cache_config, packaged_recipe
from shared.cache.shards import finished_units
from shared.data.sources import parse_hub_name
from teacher_cache.prepared.folder import describe
from teacher_cache.run.build import build_cache
from teacher_cache.run.open import open_sides, prepare_data
from tests.reading import rows_in
from tests.shared.data.test_files import hub_folder


def tulu(i: int) -> dict[str, Any]:
    question = {"role": "user", "content": f"tulu {i}?"}
    answer = {"role": "assistant", "content": f"yes, {i}"}
    return {"id": f"tulu_{i}", "messages": [question, answer], "source": "made up"}


def smoltalk(i: int) -> dict[str, Any]:
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"content": f"smoltalk {i} {role}", "role": role} for role in roles]
    return {"messages": messages, "source": "made up"}


def opc(stage: str, i: int) -> dict[str, Any]:
    language = "python" if i % 2 else "rust"
    return {"instruction": f"{stage} {i}", "output": f"```{language}\nx = {i}\n```", "code": "x"}


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Where the recipe's four data sets lie, in the hub's layout."""
    smol = {"all": [smoltalk(i) for i in range(40)], "other": [smoltalk(99)]}
    sets = [("tulu", {"default": [tulu(i) for i in range(40)]}, ""), ("smoltalk", smol, ":all")]
    for name in ("one", "two"):
        rows = [opc(name, i) for i in range(40)]
        sets.append((name, {"a": rows[:20], "b": rows[20:]}, ":*"))
    return [f"hf://{hub_folder(tmp_path / n, rows)}{c}#train[:95%]" for n, rows, c in sets]


def test_the_recipe_from_four_layouts_to_a_cache(
    sources: list[str], random_teacher: Path, tmp_path: Path
) -> None:
    sets = [f"data.{i}.source={json.dumps(source)}" for i, source in enumerate(sources)]
    sets += ["lengths={student=128, teacher=128}", "noise.draws=1", "targets.k=8"]
    sets += ['engine={dtype="float32", device="cpu"}', "shard_examples=16"]
    sets += ['targets.signals=["topk","chunks"]']
    flags = {"model": str(random_teacher), "out": tmp_path / "cache"}
    config = cache_config("tiny-cross", packaged_recipe("cross"), sets, **flags)
    assert [source.source for source in config.sources] == sources
    data, _ = prepare_data(config, open_sides(config))
    taken = [(source.rows, source.filtered, source.taken) for source in data.record.sources]
    assert taken == [(38, 0, 38), (38, 0, 38), (38, 20, 18), (38, 20, 18)]
    assert "smoltalk:all#train[:95%]" in describe(data)
    assert build_cache(config).rows == data.examples == 112
    rows = [row for unit in finished_units(config.out) for row in rows_in(config.out, unit)]
    assert {row.label for row in rows if row.label} == {f"tulu_{i}" for i in range(38)}
    first = [row.label.startswith("tulu") for row in rows[:30]]
    assert 8 <= sum(first) <= 12  # interleaved: a third of every stretch


def test_every_source_of_the_recipes_is_well_formed() -> None:
    for kind in ("llada-8b", "wedlm-8b"):
        config = cache_config(kind, None, [])
        names = [parse_hub_name(source.source.removeprefix("hf://")) for source in config.sources]
        opc_sets = [f"OpenCoder-LLM/opc-sft-stage{n}" for n in (1, 2)]
        chats = ["allenai/tulu-3-sft-mixture", "HuggingFaceTB/smoltalk"]
        assert [name for name, _, _ in names] == chats + opc_sets
        assert {split for _, _, split in names} == {"train[:95%]"}
        own = cache_config(kind, None, [], data="chats.jsonl")
        assert [source.source for source in own.sources] == ["chats.jsonl"]
