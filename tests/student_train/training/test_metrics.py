from __future__ import annotations

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
from tests.student_train.training.test_trainer import config, curve


@pytest.fixture
def poisoned(caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """NaN in the top-k of one example, as memory that fails would put it there: no shard holds any.
    Its id.
    """
    name = all_rows(caches["tiny-shared"])[3].example_id
    read = Shard.rows

    def spoiled(*args: Any) -> list[CacheRow]:
        rows = read(*args)
        return [
            dataclasses.replace(row, topk_logp=row.topk_logp * np.float32("nan"))
            if row.example_id == name and row.topk_logp is not None
            else row
            for row in rows
        ]

    monkeypatch.setattr(Shard, "rows", spoiled)
    return name


def settings(cache: Path, out: Path, **changes: Any) -> Any:
    return config(cache, out, distillation={"type": "kl"}, **changes)


def test_a_loss_that_is_not_finite_stops_the_run_and_can_be_replayed(
    caches: dict[str, Path], tmp_path: Path, poisoned: str
) -> None:
    name, out = poisoned, tmp_path / "run"
    with pytest.raises(TideError, match=name):
        train_student(settings(caches["tiny-shared"], out))
    assert not (out / "model").exists()
    report = replay(out)
    assert name in report
    assert "targets that are not finite: topk_logp" in report
    assert (
        "weights that are not finite: none" in report
    )  # the very moment: before the step that spoiled them
    assert "sum of distillation nan" in report


def test_diverging_weights_are_told_from_bad_targets(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    diverging = {"learning_rate": 1e30, "max_grad_norm": 1e30}
    with pytest.raises(TideError):
        train_student(settings(caches["tiny-shared"], tmp_path, **diverging))
    report = replay(tmp_path)
    assert "targets that are not finite: none" in report


def test_a_tracker_that_is_not_installed_is_named_before_anything_runs(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(TideError, match="wandb"):
        train_student(settings(caches["tiny-shared"], tmp_path, report_to=["wandb"]))
    assert not (tmp_path / "run.json").exists()


def test_what_is_watched(caches: dict[str, Path], tmp_path: Path) -> None:
    train_student(settings(caches["tiny-shared"], tmp_path, max_steps=4))
    logged = [entry for entry in curve(tmp_path) if "loss" in entry]
    assert all(0 < entry["teacher_mass_in_topk"] <= 1 for entry in logged)
    assert all(entry["masked_positions"] == entry["active_chunks"] > 0 for entry in logged)
    with pytest.raises(TideError, match="record"):
        replay(tmp_path)
