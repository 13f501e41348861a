"""Recipes that lean on others, and their distance from the paper's run."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.recipes.read import cache_config, packaged_recipe, read_recipe, train_config
from pipelines.recipes.show import describe_recipe, paper_of
from shared.settings.objectives import KL, ReverseCalm
from shared.system.errors import TideError


def test_the_papers_runs_are_the_references() -> None:
    """Its README, distill_llada2.sh and distill_wedlm.sh, value by value."""
    cross, shared = packaged_recipe("paper-cross"), packaged_recipe("paper-shared")
    cache, train = cache_config(None, cross, []), train_config(None, cross, [])
    assert (cache.teacher, cache.noise.comp_demo, cache.targets.signals) == (
        "llada2-mini",
        False,
        ("chunks",),
    )
    assert (cache.lengths.student, cache.lengths.teacher, cache.lengths.block) == (512, 1024, 32)
    assert train.distillation == ReverseCalm(temperature=5.0)
    assert (train.global_batch, train.learning_rate, train.epochs, train.weight) == (
        64,
        5e-5,
        10,
        1.0,
    )
    cache, train = cache_config(None, shared, []), train_config(None, shared, [])
    assert (cache.teacher, cache.noise.comp_demo, cache.noise.demo_ratio) == (
        "wedlm-8b-x0_xt",
        True,
        0.5,
    )
    assert (cache.targets.positions, cache.targets.teacher_text, cache.lengths.teacher) == (
        "content",
        "own",
        768,
    )
    assert isinstance(train.distillation, KL) and train.distillation.tidal is not None
    tidal = train.distillation.tidal
    assert (tidal.axis, tidal.timestep_weight, tidal.growth) == ("both", "midrange", "cosine")
    assert (tidal.lambda_init, tidal.lambda_max, train.distillation.temperature) == (0.1, 0.9, 2.0)
    assert (train.global_batch, train.learning_rate) == (80, 5e-5)
    assert len(cache.sources) == 4


def test_the_defaults_keep_what_their_user_asked_for() -> None:
    cache, train = cache_config("llada-8b", None, []), train_config("llada-8b", None, [])
    assert cache.noise.comp_demo and isinstance(train.distillation, ReverseCalm)
    assert (cache_config("wedlm-8b", None, []).targets.teacher_text, cache.lengths.teacher) == (
        "own",
        1024,
    )


def test_show_prints_the_distance_setting_by_setting() -> None:
    lines = describe_recipe("cross").splitlines()
    found = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line.startswith("  ")}
    assert found["cache.noise.comp_demo"] == "false → true"
    assert found["cache.noise.draws"] == "10 → 4"
    assert any("settings differ from paper-cross" in line for line in lines)
    assert "No setting differs" in describe_recipe("paper-cross")
    assert (
        paper_of(packaged_recipe("shared"))
        == paper_of(packaged_recipe("wedlm-8b"))
        == "paper-shared"
    )
    with pytest.raises(TideError, match="there is no recipe 'crass'"):
        describe_recipe("crass")


def test_a_recipe_may_lean_on_another(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(
        'base = "shared"\n[cache]\ntargets = { k = 8 }\n[train]\ndistillation = { type = "calm" }\n'
    )
    values = read_recipe(mine)
    assert (
        values["cache"]["targets"]["k"] == 8
        and values["cache"]["targets"]["positions"] == "content"
    )
    assert values["train"]["distillation"] == {"type": "calm"}  # a variant replaces the other whole
    (tmp_path / "more.toml").write_text('base = "mine.toml"\n[train]\nepochs = 1\n')
    assert read_recipe(tmp_path / "more.toml")["train"]["epochs"] == 1
    mine.write_text('base = "more.toml"\n')
    with pytest.raises(TideError, match="is a base of itself"):
        read_recipe(mine)
    for text, message in (
        ('base = "none"', "has the base 'none'"),
        ("base = 3", "base in .* is 3"),
        ("cache = 1", "is a value"),
    ):
        mine.write_text(text + "\n")
        with pytest.raises(TideError, match=message):
            read_recipe(mine)
