"""Several processes and accumulation: the gradient is that of one large batch."""

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
from tests.student_train.training.test_trainer import config, curve

pytestmark = pytest.mark.slow


def run(settings: Any, processes: int, optimizer: str = "sgd") -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    launcher = [*launcher, "--master-port=29611"] if processes > 1 else []
    module = ["-m", "tests.student_train.training.descend"]
    command = [sys.executable, *launcher, *module, json.dumps(to_plain(settings)), optimizer]
    how = {"env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, **how)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("teacher", "distillation", "parallel"),
    [
        ("tiny-cross", {"type": "reverse_calm"}, "ddp"),
        ("tiny-shared", {"type": "kl", "tidal": {}}, "ddp"),
        ("tiny-cross", {"type": "reverse_calm"}, "fsdp"),
    ],
    ids=["reverse_calm", "kl", "sharded"],
)
def test_two_processes_make_the_gradient_of_one(
    caches: dict[str, Path], tmp_path: Path, teacher: str, distillation: Any, parallel: str
) -> None:
    """Batch 8 in one process, 4 in each of two; and the same with two accumulated batches."""
    descent = {"learning_rate": 1.0, "schedule": "constant_with_warmup", "warmup_ratio": 0.0}
    often = {"max_grad_norm": 1e9, "log_steps": 1, "checkpoint_steps": 1, "eval_steps": 2}
    for accumulation in (1, 2):
        weights, curves = [], []
        for processes, way in ((1, "ddp"), (2, parallel)):
            how = {**descent, **often, "distillation": distillation, "accumulation": accumulation}
            how |= {"batch_size": 8 // processes, "max_steps": 2, "parallel": way}
            settings = config(caches[teacher], tmp_path / f"{accumulation}-{processes}", **how)
            run(settings, processes)
            weights.append(load_file(settings.out / "model" / "model.safetensors"))
            curves.append(curve(settings.out))
        for name, expected in weights[0].items():
            torch.testing.assert_close(weights[1][name], expected, rtol=0, atol=1e-6)
        for a, b in zip(*curves, strict=True):
            assert a.keys() == b.keys()
            assert b == {key: pytest.approx(value, rel=1e-5, abs=1e-6) for key, value in a.items()}


def test_a_sharded_run_goes_on_from_its_checkpoint(caches: dict[str, Path], tmp_path: Path) -> None:
    how = {"log_steps": 1, "checkpoint_steps": 2, "eval_steps": 2, "parallel": "fsdp"}
    how |= {"distillation": {"type": "reverse_calm"}, "max_steps": 4}
    settings = config(caches["tiny-cross"], tmp_path / "run", **how)
    run(settings, 2, "adamw_torch")
    before = load_file(settings.out / "model" / "model.safetensors")
    for lost in (settings.out / "checkpoints" / "checkpoint-4", settings.out / "model"):
        shutil.rmtree(lost)
    run(settings, 2, "adamw_torch")
    after = load_file(settings.out / "model" / "model.safetensors")
    assert all(after[name].equal(value) for name, value in before.items())
