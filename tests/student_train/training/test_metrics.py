"""A loss that is not finite stops a run, and `replay` shows where it broke."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.cache.row import CacheRow
from shared.cache.shards import Shard
from shared.system.errors import TideError
from student_train.training.replay import replay
from student_train.training.trainer import train_student
from tests.reading import all_rows
from tests.student_train.training.test_trainer import config


def settings(cache: Path, out: Path, **changes: Any) -> Any:
    return config(cache, out, distillation={"type": "kl"}, **changes)


def test_a_loss_that_is_not_finite_stops_the_run_and_can_be_replayed(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the top-k of one example, as memory that fails would put it there."""
    name, out = all_rows(caches["tiny-shared"])[3].example_id, tmp_path / "run"
    read = Shard.rows

    def spoiled(*args: Any) -> list[CacheRow]:
        rows = read(*args)
        for i, row in enumerate(rows):
            if row.example_id == name and row.topk_logp is not None:
                rows[i] = dataclasses.replace(row, topk_logp=row.topk_logp * np.float32("nan"))
        return rows

    monkeypatch.setattr(Shard, "rows", spoiled)
    with pytest.raises(TideError, match=name):
        train_student(settings(caches["tiny-shared"], out))
    assert not (out / "model").exists()
    report = replay(out)
    assert name in report
    assert "targets that are not finite: topk_logp" in report
    assert "weights that are not finite: none" in report  # before the step that spoiled them
    assert "sum of distillation nan" in report


def test_diverging_weights_are_told_from_bad_targets(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    diverging = {"learning_rate": 1e30, "max_grad_norm": 1e30}
    with pytest.raises(TideError):
        train_student(settings(caches["tiny-shared"], tmp_path, **diverging))
    assert "targets that are not finite: none" in replay(tmp_path)
    with pytest.raises(TideError):
        replay(tmp_path / "model")  # where nothing is recorded


def test_a_tracker_that_is_not_installed_is_named_before_anything_runs(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(TideError, match="wandb"):
        train_student(settings(caches["tiny-shared"], tmp_path, report_to=["wandb"]))
    assert not (tmp_path / "run.json").exists()
