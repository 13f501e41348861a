from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.experiments.ablate import Grid
from pipelines.recipes.read import cache_config, packaged_recipe, train_config
from shared.cache.manifest import differences
from shared.settings.build import apply_overrides, build, read_toml, to_plain
from shared.settings.config import CacheConfig, TrainConfig
from shared.settings.objectives import KL, NoDistillation, ReverseCalm
from shared.system.errors import TideError


def test_overrides_reach_nested_settings() -> None:
    values: dict[str, Any] = {"noise": {"seed": 1}}
    apply_overrides(
        values, ["noise.draws=4", "data.source=my data.jsonl", "targets.temperatures=[1, 3.5]"]
    )
    config = build(CacheConfig, values)
    assert (config.noise.seed, config.noise.draws) == (1, 4)
    assert [source.source for source in config.sources] == ["my data.jsonl"]
    assert config.targets.stored_temperatures == (1.0, 3.5)


def test_objectives_are_types() -> None:
    assert build(TrainConfig, {}).distillation == NoDistillation()
    shared = train_config("tiny-shared", None, []).distillation
    assert isinstance(shared, KL)
    assert shared.tidal is not None
    assert isinstance(train_config("tiny-cross", None, []).distillation, ReverseCalm)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"noise": {"drws": 3}}, "noise.drws: no such setting"),
        ({"noise": {"draws": 0}}, "noise.draws is 0"),
        (
            {"engine": {"data_parallel": 2, "device": "cuda:1"}},
            "each of 2 processes gets a GPU of its own",
        ),
        ({"engine": {"data_parallel": 2, "device_map": "auto"}}, "a device map takes all GPUs"),
        ({"noise": {"demo_ratio": 2}}, r"must lie in \[0, 1\]"),
        ({"lengths": {"student": 100}}, "multiple of lengths.block"),
        ({"targets": {"signals": ["logits"]}}, "targets.signals"),
        ({"targets": {"signals": []}}, "targets.signals is empty"),
        ({"targets": {"temperatures": [0.0]}}, "must be positive"),
        ({"engine": {"dtype": "int8"}}, "engine.dtype"),
        ({"data": {"prompt_field": "q"}}, "go together"),
    ],
)
def test_a_wrong_setting_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TideError, match=message):
        build(CacheConfig, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"distillation": {"type": "kll"}}, "'kll'"),
        ({"distillation": {"type": "kl", "temperature": -1}}, "temperature is -1"),
        (
            {"distillation": {"type": "kl", "tidal": {"lambda_init": 0.95}}},
            "0 ≤ lambda_init ≤ lambda_max ≤ 1",
        ),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"checkpoint_steps": 25, "log_steps": 10}, "must be a multiple of log_steps"),
    ],
)
def test_a_wrong_training_setting_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(TideError, match=message):
        build(TrainConfig, values)


def test_bad_override_and_bad_file(tmp_path: Path) -> None:
    with pytest.raises(TideError, match="is no setting"):
        apply_overrides({}, ["draws"])
    with pytest.raises(TideError, match="draws is a value, not a section"):
        apply_overrides({"draws": 3}, ["draws.x=1"])
    with pytest.raises(TideError, match="cannot read"):
        read_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = ")
    with pytest.raises(TideError, match="is not TOML"):
        read_toml(tmp_path / "bad.toml")
    (tmp_path / "table.toml").write_text("[eval]\n")
    with pytest.raises(TideError, match="unknown tables: eval"):
        cache_config(None, tmp_path / "table.toml", [])


@pytest.mark.parametrize(
    "path", sorted(packaged_recipe("x").parent.glob("*.toml")), ids=lambda p: p.stem
)
def test_packaged_recipes_are_valid(path: Path) -> None:
    if "variants" in read_toml(path):  # a grid for `tide ablate`
        assert build(Grid, read_toml(path)).seeds
        return
    cache_config("tiny-shared", path, [])
    train_config(None, path, [])


def test_a_teacher_without_a_recipe_takes_the_papers_settings_for_its_kind() -> None:
    config = cache_config("llada-8b", None, [])
    assert (config.lengths.student, config.lengths.teacher, config.targets.signals) == (
        512,
        1024,
        ("chunks",),
    )
    assert config.out == Path("caches/llada-8b")


def test_plain_form_and_differences() -> None:
    a, b = build(TrainConfig, {}), build(TrainConfig, {"distillation": {"type": "kl"}, "seed": 3})
    assert differences(to_plain(a), to_plain(a)) == []
    lines = differences(to_plain(a), to_plain(b))
    assert "seed: 0 → 3" in lines
    assert 'distillation.type: "none" → "kl"' in lines
    assert 'distillation.temperature: "absent" → 2.0' in lines
