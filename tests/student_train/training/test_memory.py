"""Switches that change memory and speed, and no value that is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.system.errors import TideError
from student_train.losses.fused_head import slice_rows
from student_train.training.trainer import make_trainer, train_student
from tests.student_train.training.test_trainer import config, curve


def test_gradient_checkpointing_trains_the_same_student(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    runs = [config(caches["tiny-shared"], tmp_path / str(on), distillation={"type": "kl"}, gradient_checkpointing=on)
            for on in (False, True)]  # fmt: skip
    trainer, _ = make_trainer(runs[1])
    assert trainer.args.gradient_checkpointing
    for run in runs:
        train_student(run)
    assert curve(runs[0].out) == curve(runs[1].out)
    weights = [(run.out / "model" / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]


def test_other_optimizers(caches: dict[str, Path], tmp_path: Path) -> None:
    cache, short = caches["tiny-shared"], {"heldout": None, "max_steps": 2}
    train_student(config(cache, tmp_path / "r", optimizer="adafactor", **short))
    with pytest.raises(TideError, match="adamw_8bit"):  # which needs a GPU
        make_trainer(config(cache, tmp_path / "r", optimizer="adamw_8bit"))


def test_slices_are_sized_by_memory() -> None:
    assert slice_rows(151_936) == 220  # of a CPU
    assert slice_rows(151_936, 80 << 30) == 2048
    assert slice_rows(151_936, 24 << 30) == 1130
    assert slice_rows(4096, 80 << 30) == 2048
    assert slice_rows(10**9, 1 << 30) == 32
    for memory in (8 << 30, 24 << 30, 141 << 30):  # a sixth of the GPU, at most
        assert slice_rows(151_936, memory) * 151_936 * 4 * 6 <= 0.16 * memory
