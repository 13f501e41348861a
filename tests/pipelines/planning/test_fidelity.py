from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines.planning.fidelity import measure_fidelity, table
from shared.config import StudentConfig
from shared.errors import TideError
from tests.conftest import small_cache_config

STUDENT = StudentConfig(hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=32)


def test_the_whole_vocabulary_loses_nothing_and_more_logits_lose_less(random_teacher: Path, tmp_path: Path) -> None:
    config = small_cache_config("tiny-shared", random_teacher, tmp_path / "c")
    torch.manual_seed(0)
    points = measure_fidelity(config, STUDENT, [2, 64, 4096], [1.0, 2.0], 6)
    assert not (tmp_path / "c" / "manifest.json").exists()
    for temperature in (1.0, 2.0):
        two, some, all_ = (p for p in points if p.temperature == temperature)
        assert 0 < two.mass < some.mass < all_.mass == pytest.approx(1, abs=1e-4)
        assert two.logits < some.logits < 0.99999
        for value in (all_.logits, all_.hidden, all_.head):
            assert value == pytest.approx(1, abs=1e-5)
    assert len(table(points)) == 2 + 6


def test_what_has_no_fidelity_to_measure(random_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(TideError, match="no top-k in its own vocabulary"):
        measure_fidelity(small_cache_config("tiny-cross", random_teacher, tmp_path / "c"), STUDENT, [8], [1.0], 2)
    with pytest.raises(TideError, match="k 5000 is more than the 4096 tokens"):
        measure_fidelity(small_cache_config("tiny-shared", random_teacher, tmp_path / "c"), STUDENT, [5000], [1.0], 2)
