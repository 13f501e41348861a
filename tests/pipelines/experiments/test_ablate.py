import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.experiments import ablate
from shared.system.errors import TideError
from tests.conftest import chats_file, heldout_file


def write_grid(path: Path, model: Path) -> Path:
    path.write_text(f"""
seeds = [0]
[caches.a]
teacher = "tiny-cross"
model = "{model}"
shard_examples = 8
data = {{ source = "{chats_file()}", limit = 24 }}
lengths = {{ student = 128, teacher = 128 }}
noise = {{ draws = 1 }}
[train]
max_steps = 2
batch_size = 4
device = "cpu"
precision = "float32"
student = {{ hidden_size = 32, layers = 1, heads = 2, kv_heads = 1, intermediate_size = 32 }}
heldout = {{ source = "{heldout_file()}", limit = 4 }}
[variants.plain]
cache = "a"
train = {{ distillation = {{ type = "none" }} }}
[variants.calm]
cache = "a"
train = {{ distillation = {{ type = "calm", tidal = {{ axis = "training_only" }} }}, weight = 2.0 }}
""")
    return path


def test_a_grid_trains_reports_and_resumes(
    random_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_grid(tmp_path / "grid.toml", random_teacher)
    text = ablate.run_ablation(recipe, tmp_path / "out").read_text()
    assert "| calm " in text and "calm, T 2.0, TIDAL training_only, weight 2" in text
    assert len(list((tmp_path / "out").glob("*-seed*/history.json"))) == 2
    command = next(line for line in text.splitlines() if line.startswith("* `calm`"))
    again = shlex.split(command.split("`")[3])
    assert CliRunner().invoke(app, [*again[1:], "--out", str(tmp_path / "again")]).exit_code == 0
    once, twice = (
        json.loads((tmp_path / run / "history.json").read_text())["final"]["eval_heldout_nll"]
        for run in ("out/calm-seed0", "again")
    )
    assert once == twice
    monkeypatch.setattr(ablate, "start_child", lambda *_: pytest.fail("a training began again"))
    ablate.run_ablation(recipe, tmp_path / "out")


def test_the_whole_recipe_is_checked_first(
    random_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablate, "build_cache", lambda _config: pytest.fail("a cache was begun"))
    recipe = write_grid(tmp_path / "grid.toml", random_teacher)
    whole = recipe.read_text()
    first = 'cache = "{}"\ntrain = {{ distillation = {{ type = "none"'
    changes = {
        "wieght": ("weight = 2.0", "wieght = 2.0"),
        "'b'": (first.format("a"), first.format("b")),
        "variant calm": ('type = "calm"', 'type = "clam"'),
    }
    for name, (old, new) in changes.items():
        assert old in whole
        recipe.write_text(whole.replace(old, new, 1))
        with pytest.raises(TideError, match=name):
            ablate.run_ablation(recipe, tmp_path / "out")
