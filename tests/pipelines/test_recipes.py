"""Recipes that lean on others, their distance from the paper's run, and settings as a command."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.recipes.read import (
    cache_config,
    describe_recipe,
    packaged_recipe,
    paper_of,
    read_recipe,
    to_toml,
    train_config,
)
from shared.settings.config import KL, ReverseCalm, Tidal
from shared.system.files import TideError

TEXT = st.text(st.characters(codec="ascii", categories=["L", "P", "N"]))
KEYS = st.from_regex(r"[a-z]{1,5}", fullmatch=True)
VALUES = st.recursive(
    st.booleans() | st.integers(-1000, 1000) | st.floats(-10, 10) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@given(value=VALUES)
def test_inline_toml_round_trip(value: object) -> None:
    assert tomllib.loads(f"v = {to_toml(value)}")["v"] == value


def test_the_papers_runs_are_the_references() -> None:
    """Its README, distill_llada2.sh and distill_wedlm.sh, value by value."""
    cross, shared = packaged_recipe("paper-cross"), packaged_recipe("paper-shared")
    cache, train = cache_config(None, cross, []), train_config(None, cross, [])
    assert (cache.teacher, cache.targets.signals) == ("llada2-mini", ("chunks",))
    assert (cache.noise.comp_demo, train.distillation) == (False, ReverseCalm(temperature=5.0))
    assert (cache.lengths.student, cache.lengths.teacher, cache.lengths.block) == (512, 1024, 32)
    assert (train.global_batch, train.learning_rate) == (64, 5e-5)
    assert (train.epochs, train.weight) == (10, 1.0)
    cache, train = cache_config(None, shared, []), train_config(None, shared, [])
    assert (cache.teacher, cache.lengths.teacher) == ("wedlm-8b-x0_xt", 768)
    assert (cache.noise.comp_demo, cache.noise.demo_ratio) == (True, 0.5)
    assert (cache.targets.positions, cache.targets.teacher_text) == ("content", "own")
    assert train.distillation == KL(2.0, Tidal(0.1, 0.9, "both", "cosine", "midrange"))
    assert (train.global_batch, train.learning_rate, len(cache.sources)) == (80, 5e-5, 4)


def test_a_teacher_without_a_recipe_takes_the_settings_of_its_kind() -> None:
    cache, train = cache_config("llada-8b", None, []), train_config("llada-8b", None, [])
    assert cache.noise.comp_demo and isinstance(train.distillation, ReverseCalm)
    assert (cache.lengths.teacher, cache.out) == (1024, Path("caches/llada-8b"))
    assert cache_config("wedlm-8b", None, []).targets.teacher_text == "own"


def test_other_data_are_read_without_the_limit_of_the_recipes_own() -> None:
    (own,) = cache_config("tiny-cross", None, []).sources
    changes = {"data": {"source": "d.jsonl"}}
    (other,) = cache_config("tiny-cross", None, [], changes=changes).sources
    (few,) = cache_config("tiny-cross", None, ["data.limit=5"], changes=changes).sources
    assert own.limit and (other.limit, few.limit) == (None, 5)
    (named,) = cache_config(None, packaged_recipe("tiny-cross"), [], changes=changes).sources
    assert named.limit == own.limit  # a recipe that is asked for is obeyed


def test_show_prints_the_distance_setting_by_setting() -> None:
    text = " ".join(describe_recipe("cross").split())
    assert "cache.noise.comp_demo: false → true" in text
    assert "cache.noise.draws: 10 → 4" in text
    assert "No setting differs" in describe_recipe("paper-cross")
    for name in ("shared", "wedlm-8b"):
        assert paper_of(packaged_recipe(name)) == "paper-shared"
    with pytest.raises(TideError, match="crass"):
        describe_recipe("crass")


def test_a_recipe_may_lean_on_another(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    objective = '[train]\ndistillation = { type = "calm" }'
    mine.write_text(f'base = "shared"\n[cache]\ntargets = {{ k = 8 }}\n{objective}\n')
    values = read_recipe(mine)
    targets = values["cache"]["targets"]
    assert (targets["k"], targets["positions"]) == (8, "content")
    assert values["train"]["distillation"] == {"type": "calm"}  # an objective comes whole
    (tmp_path / "more.toml").write_text('base = "mine.toml"\n[train]\nepochs = 1\n')
    assert read_recipe(tmp_path / "more.toml")["train"]["epochs"] == 1
    for text in ('base = "more.toml"', 'base = "none"', "base = 3", "cache = 1", "[eval]"):
        mine.write_text(text + "\n")
        with pytest.raises(TideError):
            read_recipe(mine)
