import re
from pathlib import Path
from typing import Any, get_args

import pytest

from pipelines.experiments.ablate import Grid
from pipelines.recipes.read import cache_config, packaged_recipe, train_config
from shared.models.architectures import ARCHITECTURES
from shared.settings.build import (
    OTHERS,
    apply_overrides,
    build,
    dataclasses_in,
    differences,
    field_types,
    read_toml,
    to_plain,
)
from shared.settings.config import KL, CacheConfig, Lora, ReverseCalm, TrainConfig
from shared.system.files import TideError
from teacher_cache.teachers.registry import ArchitectureName, find_teacher


def test_overrides_reach_nested_settings() -> None:
    values: dict[str, Any] = {"noise": {"seed": 1}, "data": [{"source": "a"}, {"source": "b"}]}
    texts = ["noise.draws=4", "data.1.source=my data.jsonl", "targets.temperatures=[1, 3.5]"]
    apply_overrides(values, texts)
    config = build(CacheConfig, values)
    assert (config.noise.seed, config.noise.draws) == (1, 4)
    assert [source.source for source in config.sources] == ["a", "my data.jsonl"]
    assert config.targets.stored_temperatures == (1.0, 3.5)
    for bad in ("draws", "=1", "noise.draws.x=1", "data.2.source=c"):
        with pytest.raises(TideError):
            apply_overrides(values, [bad])


WRONG: list[tuple[type, dict[str, Any], list[str]]] = [
    (CacheConfig, {"noise": {"drws": 3}}, ["noise.drws", "draws?"]),  # a name, and the nearest one
    (CacheConfig, {"data": [{"limt": 3}]}, ["data.0.limt", "limit"]),
    (TrainConfig, {"distillation": {"type": "kl", "temprature": 5}}, ["temperature?"]),
    (TrainConfig, {"use_peft": True}, ["student.lora={rank=16"]),  # another trainer's name
    (TrainConfig, {"student": {"lora": {"r": 8}}}, ["student.lora.r", "rank"]),
    (TrainConfig, {"report_to": "wandb"}, ['["wandb"]']),
    (CacheConfig, {"noise": {"draws": 0}}, ["noise.draws is 0, expected at least 1, at most 100"]),
    (CacheConfig, {"noise": {"draws": "x"}}, ["noise.draws is 'x', expected a whole number"]),
    (CacheConfig, {"engine": {"dtype": "int8"}}, ["engine.dtype is 'int8', expected 'auto'"]),
    (CacheConfig, {"noise": 3}, ["noise is 3, expected a table"]),
    (TrainConfig, {"distillation": {"type": "kll"}}, ["distillation.type is 'kll'", "'calm'"]),
    (CacheConfig, {"lengths": {"student": 100}}, ["lengths: student is 100"]),  # two that disagree
    (
        CacheConfig,
        {"lengths": {"teacher": 2**21}},
        ["lengths.teacher is 2097152, expected", "most"],
    ),
    (CacheConfig, {"targets": {"temperatures": [600]}}, ["temperatures", "600", "at most 500"]),
    (CacheConfig, {"data": {"weight": 1e12}}, ["data.weight is", "at most 10000"]),
    # more numbers in a column of a shard than one list of Arrow's can have
    (
        CacheConfig,
        {"shard_examples": 10**6},
        ["shard_examples is 1000000, expected at most 262143"],
    ),
    (CacheConfig, {"targets": {"k": 8000}}, ["shard_examples is 512, expected at most 262 "]),
    (CacheConfig, {"engine": {"data_parallel": 2, "device_map": "auto"}}, ["engine: device_map"]),
    (Grid, {"caches": {}, "variants": {"a": {}}}, ["variants.a.cache is missing"]),
]


def test_a_wrong_setting_is_named_with_what_is_expected() -> None:
    """In our words: none of pydantic's, and no tag of a union."""
    for kind, values, words in WRONG:
        with pytest.raises(TideError) as error:
            build(kind, values, "`tide x`")
        said = str(error.value)
        assert said.startswith("invalid settings for `tide x`: ")
        assert all(word in said for word in words), said
        assert not any(word in said for word in ("Input", "valid list", "a list of", "dataclass"))


@pytest.mark.parametrize(("theirs", "ours"), OTHERS.items())
def test_another_trainer_s_name_leads_to_a_setting_that_there_is(theirs: str, ours: str) -> None:
    tables = [CacheConfig, TrainConfig, Lora]
    assert theirs not in {name for table in tables for name in field_types(table)}
    name = re.split("[ ,=]", ours)[0]
    for kind in tables:
        place: Any = kind
        for part in name.split("."):
            hints = {k: v for one in dataclasses_in(place) for k, v in field_types(one).items()}
            place = hints.get(part)
        if place is not None:
            return
    pytest.fail(f"there is no setting {name}")


def test_packaged_recipes_are_valid_and_bad_files_are_not(tmp_path: Path) -> None:
    shared = train_config("tiny-shared", None, []).distillation
    assert isinstance(shared, KL) and shared.tidal is not None
    assert isinstance(train_config("tiny-cross", None, []).distillation, ReverseCalm)
    (tmp_path / "bad.toml").write_text("a = ")
    for name in ("none.toml", "bad.toml"):
        with pytest.raises(TideError):
            read_toml(tmp_path / name)
    for path in packaged_recipe("x").parent.glob("*.toml"):
        if "variants" in read_toml(path):  # a grid for `tide ablate`
            assert build(Grid, read_toml(path)).seeds
        else:
            cache_config("tiny-shared", path, [])
            train_config(None, path, [])


def test_plain_form_and_differences() -> None:
    values = {"distillation": {"type": "kl"}, "seed": 3}
    a, b = (to_plain(build(TrainConfig, v)) for v in ({}, values))
    assert differences(a, a) == []
    assert differences({}, {"new": None}) == []  # a run that was begun before there was `new`
    expected = {"seed: 0 → 3", 'distillation.type: "none" → "kl"'}
    assert {*expected, 'distillation.temperature: "absent" → 2.0'} <= set(differences(a, b))


def test_the_registry_takes_a_users_teacher_and_explains_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    fields = '[mine]\nmodel = "/m"\narchitecture = "llama"\nmask_id = 5\nstudent_tokens = false\n'
    fields += 'length = 9\nstudent = "/s"\n'
    file.write_text(f'{fields}attention = {{ type = "block_causal", block = 4 }}\n')
    assert find_teacher("mine", file).mask_id == 5
    with pytest.raises(TideError, match="llada-8b"):
        find_teacher("llada-8")
    other = fields.replace('"llama"', '"gpt2"')
    wrong = ((f"{fields}maskid = 3\n", "maskid"), ("mine = 3\n", "mine"), (other, "gpt2"))
    for text, name in wrong:
        file.write_text(text)
        with pytest.raises(TideError, match=name):
            find_teacher("mine", file)
    assert set(get_args(ArchitectureName)) == set(ARCHITECTURES)
