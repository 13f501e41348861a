import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.system.files import remove_leftovers
from student_train.training.resumable import MARKER, whole_checkpoints
from student_train.training.trainer import train_student
from tests.student_train.training.test_trainer import config, curve

STEPS = 12


@pytest.fixture(scope="module")
def finished(caches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended, with checkpoints 8 and 12."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train_student(settings(caches, out))
    return out


def settings(caches: dict[str, Path], out: Path):
    return config(caches["tiny-shared"], out, max_steps=STEPS, checkpoint_steps=4, log_steps=2)


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
    """Also a file that was put in later, which could be a pickle, and the marker of another step."""  # noqa: E501
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


@pytest.mark.parametrize("name", ["scheduler.pt", MARKER])
def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(
    name: str, finished: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    last = copy(finished, run)
    flip(last / name)
    train_student(settings(caches, run))
    assert curve(run) == curve(finished)
    weights = "model/model.safetensors"
    assert (run / weights).read_bytes() == (finished / weights).read_bytes()
    assert last.with_name(f"damaged-{last.name}").is_dir()  # put aside, not lost


def test_a_clock_that_steps_back_loses_no_checkpoint(
    finished: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    """Older checkpoints are dated years ahead: by date, the newest would be the first to go."""
    last = copy(finished, tmp_path / "run")
    shutil.rmtree(last)
    for folder in last.parent.glob("checkpoint-*"):
        os.utime(folder, (4e9, 4e9))
    shutil.copytree(last.with_name("checkpoint-8"), last.parent / "checkpoint-4")
    (last.parent / "checkpoint-4" / MARKER).write_text("1.0\n")
    os.utime(last.parent / "checkpoint-4", (4.1e9, 4.1e9))
    train_student(settings(caches, tmp_path / "run"))
    assert sorted(p.name for p in last.parent.glob("checkpoint-*")) == [
        "checkpoint-12",
        "checkpoint-8",
    ]
    assert curve(tmp_path / "run") == curve(finished)


def test_what_the_user_keeps_beside_checkpoints_stays(
    finished: Path, caches: dict[str, Path], tmp_path: Path
) -> None:
    last = copy(finished, tmp_path / "run")
    mine = [
        last.parent / name
        for name in ("checkpoint-8-mine", "checkpoint-best", "checkpoint-08", "checkpoint--1")
    ]
    for folder in mine:
        folder.mkdir()
        (folder / "weights").write_text("mine")
    (last.parent / "checkpoint-7").write_text("a file")
    train_student(settings(caches, tmp_path / "run"))
    assert [(folder / "weights").read_text() for folder in mine] == ["mine"] * 4
    assert (last.parent / "checkpoint-7").read_text() == "a file"


def test_files_with_names_like_temporary_ones_stay(tmp_path: Path) -> None:
    (tmp_path / "thesis" / "x.tmp").mkdir(parents=True)
    names = ("chapter1.tmp", ".chapter1.tmp", ".thesis.tide-tmp", "x.tide-tmp")
    for name in names:
        (tmp_path / "thesis" / name).write_text("mine")
    remove_leftovers([tmp_path])
    assert all((tmp_path / "thesis" / name).read_text() == "mine" for name in names)
    assert (tmp_path / "thesis" / "x.tmp").is_dir()
