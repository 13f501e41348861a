import itertools
from pathlib import Path

import pytest
import torch

from pipelines.plan.fidelity import Grid, measure_fidelity, table
from shared.settings.config import StudentConfig
from shared.system.errors import TideError
from tests.conftest import small_cache_config

STUDENT = StudentConfig(hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=32)


def test_the_whole_vocabulary_loses_nothing_and_more_of_it_loses_less(
    random_teacher: Path, tmp_path: Path
) -> None:
    targets = {"values": "float32", "pilot": 200}
    config = small_cache_config("tiny-shared", random_teacher, tmp_path / "c", targets=targets)
    torch.manual_seed(0)
    grid = Grid(ks=[2, 64, 4096], classes=[1, 8], objectives=["kl", "tidal"])
    points = measure_fidelity(config, STUDENT, grid, 8)
    assert not (tmp_path / "c" / "manifest.json").exists()
    assert len(points) == 3 * 2 * 2 * 2 * 2
    for kind, temperature in itertools.product(("kl", "tidal"), (1.0, 2.0)):
        one_class = (kind, temperature, 1, "student")
        two, some, all_ = (
            p for p in points if (p.objective, p.temperature, p.classes, p.tail) == one_class
        )
        assert 0 < two.mass < some.mass < all_.mass == pytest.approx(1, abs=1e-4)
        assert two.size < some.size < all_.size
        assert two.logits < some.logits < 0.99999
        for value in (all_.logits, all_.hidden, all_.head, all_.norm):
            assert value == pytest.approx(1, abs=1e-5)
    assert len(table(points)) == 2 + len(points)


def test_what_has_no_fidelity_to_measure(random_teacher: Path, tmp_path: Path) -> None:
    few, more = Grid(ks=[8], classes=[1], temperatures=[1.0]), Grid(ks=[5000], classes=[1])
    for teacher, grid in (("tiny-cross", few), ("tiny-shared", more)):
        config = small_cache_config(teacher, random_teacher, tmp_path / "c")
        with pytest.raises(TideError):
            measure_fidelity(config, STUDENT, grid, 4)
