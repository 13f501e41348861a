"""Switches that change memory and speed, and no value that is trained."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared.cache.shards import Unit
from shared.system.errors import TideError
from student_train.losses.objective import slice_rows
from student_train.training.trainer import make_trainer, train_student
from tests.student_train.training.test_trainer import config, curve

ROOT = Path(__file__).parents[3]


def test_checkpointing_and_a_process_that_works_ahead_train_the_same_student(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    ways = {"plain": {}, "less": {"gradient_checkpointing": True}, "ahead": {"loader_workers": 1}}
    for name, way in ways.items():
        run = config(caches["tiny-shared"], tmp_path / name, distillation={"type": "kl"}, **way)
        train_student(run)
        assert curve(tmp_path / name) == curve(tmp_path / "plain")
        weights = tmp_path / name / "model" / "model.safetensors"
        expected = tmp_path / "plain" / "model" / "model.safetensors"
        assert weights.read_bytes() == expected.read_bytes()


def test_what_a_process_of_the_loader_meets_is_said_without_a_traceback(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(caches["tiny-shared"], tmp_path / "c"))
    trainer, _ = make_trainer(config(cache, tmp_path / "r", loader_workers=1, heldout=None))
    for part in range(3):
        Unit(0, part).path(cache).unlink()
    with pytest.raises(TideError, match="part-0000") as caught:
        trainer.train_resuming()
    assert "Traceback" not in str(caught.value)


def test_other_optimizers(caches: dict[str, Path], tmp_path: Path) -> None:
    cache, short = caches["tiny-shared"], {"heldout": None, "max_steps": 2}
    train_student(config(cache, tmp_path / "r", optimizer="adafactor", **short))
    with pytest.raises(TideError, match="adamw_8bit"):  # which needs a GPU
        make_trainer(config(cache, tmp_path / "r", optimizer="adamw_8bit"))


def test_slices_are_sized_by_memory() -> None:
    assert slice_rows(151_936) == 220  # of a CPU
    assert slice_rows(151_936, 80 << 30) == 2048
    assert slice_rows(10**9, 1 << 30) == 32
    for memory in (8 << 30, 24 << 30, 141 << 30):  # a sixth of the GPU, at most
        assert slice_rows(151_936, memory) * 151_936 * 4 * 6 <= 0.16 * memory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "objective"),
    [("tiny-shared", {"type": "kl", "tidal": {}}), ("tiny-cross", {"type": "reverse_calm"})],
    ids=["kl", "reverse_calm"],
)
def test_a_compiled_run_has_the_losses_of_a_plain_one(
    caches: dict[str, Path], tmp_path: Path, teacher: str, objective: dict
) -> None:
    """And compiles nothing anew over batches of other lengths."""
    command = [sys.executable, "-m", "tests.student_train.training.compiled_run"]
    command += [str(caches[teacher]), str(tmp_path), json.dumps(objective)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    how = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = json.loads(done.stdout.splitlines()[-1])
    assert runs["on"]["losses"] == pytest.approx(runs["off"]["losses"], rel=2e-5)
    assert runs["off"]["graphs"][-1] == 0
    graphs = runs["on"]["graphs"]
    assert graphs[1] == 2  # one for all layers, one for the loss
    assert graphs[-1] <= 3  # the loss once more where shapes met by chance
    assert graphs[-1] == graphs[6]  # the second epoch compiles nothing
