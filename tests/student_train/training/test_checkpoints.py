import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from student_train.training.resumable import MARKER, whole_checkpoints
from student_train.training.trainer import train_student
from tests.student_train.training.test_trainer import config, curve

STEPS = 12


@pytest.fixture(scope="module")
def finished(caches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended, with checkpoints 8 and 12."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train_student(config(caches["tiny-shared"], out))
    return out


def copy(finished: Path, out: Path) -> Path:
    """The run as it was when it had come to its last checkpoint."""
    shutil.copytree(finished, out)
    shutil.rmtree(out / "model")
    (out / "history.json").unlink()
    return out / "checkpoints" / f"checkpoint-{STEPS}"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_step(path: Path) -> None:
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "global_step": 3}))


def test_every_damage_to_a_checkpoint_is_seen(finished: Path, tmp_path: Path) -> None:
    """Also a file put in later, which could be a pickle, and the marker of another step."""
    damages: list[tuple[str, Callable[[Path], object]]] = [
        ("optimizer.pt", flip),
        ("rng_state.pth", Path.unlink),
        ("model.safetensors", flip),
        ("trainer_state.json", edit_step),
        (MARKER, lambda path: path.write_bytes(b"")),
        ("pytorch_model.bin", lambda path: path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")),
    ]
    for i, (name, damage) in enumerate(damages):
        last = copy(finished, tmp_path / str(i))
        damage(last / name)
        assert [c.step for c in whole_checkpoints(last.parent)] == [8], name
    last = copy(finished, tmp_path / "run")
    shutil.copytree(last, last.with_name("checkpoint-99"))
    assert [c.step for c in whole_checkpoints(last.parent)] == [8, 12]


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(
    finished: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    last = copy(finished, run)
    flip(last / "scheduler.pt")
    train_student(config(caches["tiny-shared"], run))
    assert curve(run) == curve(finished)
    weights = "model/model.safetensors"
    assert (run / weights).read_bytes() == (finished / weights).read_bytes()
    assert last.with_name(f"damaged-{last.name}").is_dir()  # put aside, not lost


def test_no_checkpoint_is_lost_and_what_the_user_keeps_beside_them_stays(
    finished: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    """The clock stepped back: by the dates of the older ones, the newest would be first to go."""
    last = copy(finished, tmp_path / "run")
    shutil.rmtree(last)
    folder = last.parent
    for older in folder.glob("checkpoint-*"):
        os.utime(older, (4e9, 4e9))
    shutil.copytree(folder / "checkpoint-8", folder / "checkpoint-4")
    (folder / "checkpoint-4" / MARKER).write_text("1.0\n")
    os.utime(folder / "checkpoint-4", (4.1e9, 4.1e9))
    mine = ["checkpoint-8-mine", "checkpoint-best", "checkpoint-08", "checkpoint--1"]
    for name in mine:
        (folder / name).mkdir()
        (folder / name / "weights").write_text("mine")
    (folder / "checkpoint-7").write_text("a file")
    train_student(config(caches["tiny-shared"], tmp_path / "run"))
    kept = {path.name for path in folder.glob("checkpoint-*")}
    assert kept == {"checkpoint-8", "checkpoint-12", "checkpoint-7", *mine}
    assert all((folder / name / "weights").read_text() == "mine" for name in mine)
    assert curve(tmp_path / "run") == curve(finished)
