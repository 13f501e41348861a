"""`global_batch`: one step of the same rows and the same gradient, however it is divided."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.settings.config import TrainConfig
from shared.system.errors import TideError
from student_train.batches.loader import BatchDataset
from student_train.batches.open_cache import open_cache
from student_train.training.preflight import settle_batch
from student_train.training.trainer import train_student
from tests.student_train.training.test_trainer import config


@pytest.mark.parametrize(
    ("whole", "most", "processes", "expected"),
    [(64, 8, 1, (8, 8)), (80, 8, 8, (5, 2)), (7, 4, 1, (1, 7)), (6, 100, 2, (3, 1))],
)  # fmt: skip
def test_it_is_divided_over_processes_and_passes(
    whole: int, most: int, processes: int, expected: tuple[int, int]
) -> None:
    settled = settle_batch(TrainConfig(global_batch=whole, batch_size=most), processes)
    assert (settled.batch_size, settled.accumulation) == expected
    assert settle_batch(settled, processes) == settled
    assert settled.batch_size * settled.accumulation * processes == whole


def test_what_does_not_divide_is_refused_with_a_number_that_does() -> None:
    with pytest.raises(TideError, match="66"):
        settle_batch(TrainConfig(global_batch=64), 3)
    with pytest.raises(TideError, match="accumulation"):
        settle_batch(TrainConfig(global_batch=64, accumulation=2), 1)
    assert settle_batch(TrainConfig(accumulation=2), 3).accumulation == 2


def test_every_division_sees_the_same_rows_in_every_step(caches: dict[str, Path]) -> None:
    def steps(processes: int, most: int) -> list[list[str]]:
        settings = TrainConfig(
            cache=caches["tiny-shared"], global_batch=12, batch_size=most, epochs=2.0
        )
        settings = settle_batch(settings, processes)
        data = BatchDataset(open_cache(settings), settings, processes)
        parts = processes * settings.accumulation
        assert len(data) % parts == 0
        found = []
        for step in range(len(data) // parts):
            rows = [
                row for i in range(parts) for row in data.rows(step * parts + i) if row.masked.size
            ]
            found.append(sorted(row.example_id for row in rows))
        return found

    one = steps(1, 12)
    assert sum(map(len, one)) > 12
    assert steps(1, 4) == steps(2, 6) == steps(3, 2) == one


def test_passes_of_a_step_make_the_gradient_of_one(caches: dict[str, Path], tmp_path: Path) -> None:
    weights = []
    for most in (12, 3):
        out = tmp_path / str(most)
        train_student(
            config(caches["tiny-shared"], out, global_batch=12, batch_size=most, max_steps=3)
        )
        weights.append(load_file(out / "model" / "model.safetensors"))
        recorded = json.loads((out / "run.json").read_text())["config"]
        assert recorded["global_batch"] == 12 and "batch_size" not in recorded
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-6)
