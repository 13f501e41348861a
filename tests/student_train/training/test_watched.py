"""What a run is warned of before it begins; a loss that is not finite stops it, and `replay` shows
where it broke; what becomes of damaged checkpoints.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.cache.shards import Shard
from shared.data.conversation import content_of
from shared.data.reading import iter_examples
from shared.settings.config import DataConfig
from shared.system import hardware
from shared.system.files import TideError
from student_train.training.replay import replay
from student_train.training.resumable import MARKER, whole_checkpoints
from student_train.training.trainer import make_trainer, train_student
from teacher_cache.run.build import build_cache
from tests.conftest import files, small_cache_config, write_chats
from tests.reading import all_rows
from tests.student_train.training.test_trainer import config, curve


@pytest.mark.parametrize("how", [{}, {"global_batch": 6, "batch_size": 3}])
def test_a_loss_that_is_not_finite_stops_the_run_and_can_be_replayed(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    """NaN in the top-k of one example, as memory that fails would put it there; also where a step
    is several passes.
    """
    name, out = all_rows(caches["tiny-shared"])[3].example_id, tmp_path / "run"
    read = Shard.rows

    def spoiled(*args: Any) -> list[Any]:
        rows: list[Any] = read(*args)
        for i, row in enumerate(rows):
            if row.example_id == name:
                rows[i] = replace(row, topk_logp=row.topk_logp * np.float32("nan"))
        return rows

    monkeypatch.setattr(Shard, "rows", spoiled)
    with pytest.raises(TideError, match=name):
        train_student(config(caches["tiny-shared"], out, distillation={"type": "kl"}, **how))
    assert not (out / "model").exists()
    report = replay(out)
    assert name in report
    assert "targets that are not finite: topk_logp" in report
    assert "weights that are not finite: none" in report  # before the step that spoiled them
    assert "sum of distillation nan" in report


def test_diverging_weights_are_no_bad_targets(caches: dict[str, Path], tmp_path: Path) -> None:
    how = {"distillation": {"type": "kl"}, "learning_rate": 1e30, "max_grad_norm": 1e30}
    with pytest.raises(TideError):
        train_student(config(caches["tiny-shared"], tmp_path, **how))
    assert "targets that are not finite: none" in replay(tmp_path)


def test_a_split_by_content_shares_nothing(random_teacher: Path, tmp_path: Path) -> None:
    """Without a warning, which would be an error here; repeats fall on one side. What is held out
    and trained on is counted.
    """
    split: dict[str, Any] = {"heldout_share": 0.3, "split": "train"}
    split |= write_chats(tmp_path / "d.jsonl", [f"x = {i % 40}" for i in range(80)])
    build_cache(small_cache_config("tiny-cross", random_teacher, tmp_path / "c", data=split))
    with pytest.warns(UserWarning, match="10 of 10 held-out"):
        make_trainer(config(tmp_path / "c", tmp_path / "o", heldout={**split, "limit": 10}))
    split |= {"split": "heldout"}
    make_trainer(config(tmp_path / "c", tmp_path / "r", heldout=split))
    ours = {content_of(example.id) for example in iter_examples(DataConfig(**split))}
    theirs = {content_of(row.example_id) for row in all_rows(tmp_path / "c")}
    assert len(ours) + len(theirs) == 40 and not ours & theirs and ours


def test_every_answer_of_a_conversation_is_cached(random_teacher: Path, tmp_path: Path) -> None:
    turns = [{"role": role, "content": "x = 1 + 2"} for role in ("user", "assistant")]
    chats = [{"messages": [*turns, *turns, {"role": "user", "content": f"{i}"}]} for i in range(8)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    data = {"source": str(tmp_path / "d.jsonl"), "turns": "all"}
    build_cache(small_cache_config("tiny-cross", random_teacher, tmp_path / "c", data=data))
    rows = all_rows(tmp_path / "c")
    assert {len(row.spans) for row in rows} == {2}
    assert any((row.masked < row.spans[0, 1]).any() for row in rows)


def test_a_cache_keeps_the_precision_that_it_was_begun_with(
    caches: dict[str, Path], random_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, tiny = tmp_path / "c", "tiny-cross"
    auto = small_cache_config(tiny, random_teacher, out, engine={"device": "cpu"})
    monkeypatch.setattr(hardware, "bfloat16_in_hardware", lambda _device: False)
    build_cache(auto)
    shutil.rmtree(out / "shards" / "draw=01")
    monkeypatch.setattr(hardware, "bfloat16_in_hardware", lambda _device: True)
    assert build_cache(auto).computed == 3
    assert files(out) == files(caches[tiny])  # the very cache that float32 by name makes
    engine = {"device": "cpu", "dtype": "bfloat16"}
    with pytest.raises(TideError, match="dtype"):
        build_cache(small_cache_config(tiny, random_teacher, out, engine=engine))


# --- Checkpoints -------------------------------------------------------------------------------


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
    return out / "checkpoints" / "checkpoint-12"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_every_damage_to_a_checkpoint_is_seen(finished: Path, tmp_path: Path) -> None:
    """Also a file put in later, which could be a pickle, and the marker of another step."""
    damages: list[tuple[str, Callable[[Path], object]]] = [
        ("optimizer.pt", flip),
        ("rng_state.pth", Path.unlink),
        ("model.safetensors", flip),
        ("trainer_state.json", lambda path: path.write_text(path.read_text().replace("12", "3"))),
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


def test_damage_is_put_aside(finished: Path, caches: dict[str, Path], tmp_path: Path) -> None:
    """The clock stepped back: by the dates of the older ones, the newest would be first to go."""
    run, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    flip(copy(finished, run) / "scheduler.pt")
    shutil.copytree(folder / "checkpoint-8", folder / "checkpoint-4")
    (folder / "checkpoint-4" / MARKER).write_text("1.0\n")
    os.utime(folder / "checkpoint-8", (4e9, 4e9))
    os.utime(folder / "checkpoint-4", (4.1e9, 4.1e9))
    mine = ["checkpoint-8-mine", "checkpoint-best", "checkpoint-08", "checkpoint--1"]
    for name in mine:
        (folder / name).mkdir()
        (folder / name / "weights").write_text("mine")
    (folder / "checkpoint-7").write_text("a file")
    train_student(config(caches["tiny-shared"], run))
    kept = {path.name for path in folder.glob("*checkpoint-*")}
    aside = ["damaged-checkpoint-12", "damaged-checkpoint-4"]  # not lost
    assert kept == {"checkpoint-8", "checkpoint-12", "checkpoint-7", *aside, *mine}
    assert all((folder / name / "weights").read_text() == "mine" for name in mine)
    assert curve(run) == curve(finished)
    weights = [(out / "model" / "model.safetensors").read_bytes() for out in (run, finished)]
    assert weights[0] == weights[1]
