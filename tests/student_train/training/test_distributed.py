"""Several processes and accumulation: the gradient is that of one large batch, whoever holds which
rows.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.settings.build import to_plain
from tests.reading import dataset
from tests.student_train.training.test_trainer import config, curve


def run(settings: Any, processes: int, optimizer: str = "sgd") -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc-per-node={processes}",
                                          "--master-port=29611"]  # fmt: skip
    module = ["-m", "tests.student_train.training.descend"]
    command = [sys.executable, *launcher, *module, json.dumps(to_plain(settings)), optimizer]
    done = subprocess.run(
        command, env={**environment, "PYTHONPATH": "."}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "distillation"),
    [("tiny-cross", {"type": "reverse_calm"}), ("tiny-shared", {"type": "kl", "tidal": {}})],
)
def test_two_processes_make_the_gradient_of_one(
    caches: dict[str, Path], tmp_path: Path, teacher: str, distillation: Any
) -> None:
    """Batch 8 in one process, 4 in each of two; and the same with two accumulated batches."""
    for accumulation in (1, 2):
        compare(caches[teacher], tmp_path / str(accumulation), distillation, accumulation)


@pytest.mark.slow
def test_sharded_processes_make_the_gradient_of_one(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    for accumulation in (1, 2):
        compare(
            caches["tiny-cross"],
            tmp_path / str(accumulation),
            {"type": "reverse_calm"},
            accumulation,
            "fsdp",
        )


@pytest.mark.slow
def test_a_sharded_run_goes_on_from_its_checkpoint(caches: dict[str, Path], tmp_path: Path) -> None:
    settings = config(
        caches["tiny-cross"], tmp_path / "run", distillation={"type": "reverse_calm"}, max_steps=4,
        log_steps=1, checkpoint_steps=2, eval_steps=2, parallel="fsdp",
    )  # fmt: skip
    run(settings, 2, "adamw_torch")
    before = load_file(settings.out / "model" / "model.safetensors")
    for lost in (settings.out / "checkpoints" / "checkpoint-4", settings.out / "model"):
        shutil.rmtree(lost)
    run(settings, 2, "adamw_torch")
    after = load_file(settings.out / "model" / "model.safetensors")
    assert all(after[name].equal(value) for name, value in before.items())


def compare(
    cache: Path, folder: Path, distillation: Any, accumulation: int, parallel: str = "ddp"
) -> None:
    weights, curves = [], []
    folder.mkdir()
    for name, processes, batch in [("one", 1, 8), ("two", 2, 4)]:
        settings = config(
            cache, folder / name, distillation=distillation, batch_size=batch, accumulation=accumulation,
            max_steps=2, learning_rate=1.0, schedule="constant_with_warmup", warmup_ratio=0.0, max_grad_norm=1e9,
            log_steps=1, checkpoint_steps=1, eval_steps=2,
            parallel=parallel if processes > 1 else "ddp",
        )  # fmt: skip
        run(settings, processes)
        weights.append(load_file(settings.out / "model" / "model.safetensors"))
        curves.append(curve(settings.out))
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=0, atol=1e-6)
    for a, b in zip(curves[0], curves[1], strict=True):
        assert a.keys() == b.keys()
        assert b == {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in a.items()}


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_very_rows_of_one(caches: dict[str, Path], processes: int) -> None:
    one = dataset(caches["tiny-cross"], batch_size=2 * processes, epochs=2.0)
    many = dataset(caches["tiny-cross"], processes, batch_size=2, epochs=2.0)
    assert len(many) == processes * len(one)
    for i in range(len(one)):
        whole = [(row.example_id, row.draw) for row in one.rows(i)]
        parts = [row for p in range(processes) for row in many.rows(i * processes + p)]
        assert sorted((row.example_id, row.draw) for row in parts if row.maskable) == sorted(whole)
        counts = torch.stack([many[i * processes + p]["counts"] for p in range(processes)]).sum(
            dim=0
        )
        assert counts.tolist() == one[i]["counts"].tolist()
