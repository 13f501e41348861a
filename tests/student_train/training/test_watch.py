from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import TideError
from shared.shards import finished_units
from student_train.training.replay import replay
from student_train.training.trainer import train_student
from tests.student_train.training.test_trainer import config, curve


def poison(cache: Path, example: int) -> str:
    """Write NaN into the cached logits of one example in every draw; returns its id."""
    name = ""
    for unit in finished_units(cache):
        if unit.part:
            continue
        table = pq.ParquetFile(unit.path(cache)).read()
        name = table.column("example_id")[example].as_py()
        place = table.schema.get_field_index("topk_logp")
        column = table.column(place).combine_chunks()
        values, offsets = np.asarray(column.values).copy(), column.offsets.to_numpy()
        values[offsets[example] : offsets[example + 1]] = np.nan
        made = pa.ListArray.from_arrays(column.offsets, pa.array(values)).cast(column.type)
        pq.write_table(table.set_column(place, table.schema.field(place), made), unit.path(cache))
    return name


def settings(cache: Path, out: Path, **changes: Any) -> Any:
    return config(cache, out, distillation={"type": "kl"}, **changes)


def test_a_loss_that_is_not_finite_stops_the_run_and_can_be_replayed(caches: dict[str, Path], tmp_path: Path) -> None:
    cache = Path(shutil.copytree(caches["tiny-shared"], tmp_path / "cache"))
    name = poison(cache, 3)
    out = tmp_path / "run"
    with pytest.raises(TideError, match=r"not finite at step \d+; examples[\s\S]*tide replay") as stopped:
        train_student(settings(cache, out))
    assert name in str(stopped.value)
    assert not (out / "model").exists()
    report = replay(out)
    assert name in report
    assert "targets that are not finite: topk_logits" in report
    assert "weights that are not finite: none" in report  # the very moment: before the step that spoiled them
    assert "sum of distillation nan" in report


def test_diverging_weights_are_told_from_bad_targets(caches: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TideError, match="was not finite"):
        train_student(settings(caches["tiny-shared"], tmp_path, learning_rate=1e30, max_grad_norm=1e30, max_steps=12))
    report = replay(tmp_path)
    assert "targets that are not finite: none" in report
    assert "rows of logits that are not finite" in report


def test_a_tracker_that_is_not_installed_is_named_before_anything_runs(caches: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TideError, match=r"names wandb[\s\S]*pip install wandb"):
        train_student(settings(caches["tiny-shared"], tmp_path, report_to=["wandb"]))
    assert not (tmp_path / "run.json").exists()


def test_what_is_watched(caches: dict[str, Path], tmp_path: Path) -> None:
    train_student(settings(caches["tiny-shared"], tmp_path, max_steps=4))
    logged = [entry for entry in curve(tmp_path) if "loss" in entry]
    assert all(0 < entry["teacher_mass_in_topk"] <= 1 for entry in logged)
    assert all(entry["masked_positions"] == entry["active_chunks"] > 0 for entry in logged)
    with pytest.raises(TideError, match="has no record of a loss"):
        replay(tmp_path)
