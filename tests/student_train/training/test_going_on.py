"""What a run may change when it goes on, and what trackers are told of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.cache.manifest import load_manifest
from shared.system.errors import TideError
from student_train.training.trainer import make_trainer, train_student
from tests.student_train.training.test_trainer import config, curve


def logged(out: Path, name: str = "loss") -> dict[int, float]:
    return {entry["step"]: entry[name] for entry in curve(out) if "loss" in entry}


def test_the_logs_epoch_is_the_epoch(caches: dict[str, Path], tmp_path: Path) -> None:
    """Twenty-four examples in batches of 4 are six steps, whatever accumulates or shares a step."""
    for changes in ({"batch_size": 2, "accumulation": 2}, {"draws_per_step": 2}):
        out = tmp_path / str(len(changes))
        train_student(config(caches["tiny-cross"], out, log_steps=1, heldout=None, **changes))
        epochs = logged(out, "epoch")
        assert epochs[6] == pytest.approx(1) and epochs[12] == pytest.approx(2), changes


def test_a_run_is_extended(caches: dict[str, Path], tmp_path: Path) -> None:
    """At a constant rate it is the longer run, step for step; run.json and the curve say so."""
    cache, short = caches["tiny-cross"], tmp_path / "short"
    constant = {"schedule": "constant_with_warmup", "warmup_ratio": 0.0, "heldout": None}
    train_student(config(cache, tmp_path / "long", **constant))
    train_student(config(cache, short, max_steps=4, **constant))
    train_student(config(cache, short, **constant))
    assert logged(short) == logged(tmp_path / "long")
    assert json.loads((short / "run.json").read_text())["steps"] == 12
    train_student(config(cache, short, max_steps=-1, epochs=3, **constant))  # by epochs too
    assert curve(short)[-1]["step"] == 18
    for changes in ({"max_steps": 8}, {"max_steps": 24, "learning_rate": 1e-3}):
        with pytest.raises(TideError):
            train_student(config(cache, short, **{**constant, **changes}))


def test_how_a_run_is_looked_at_may_change(caches: dict[str, Path], tmp_path: Path) -> None:
    """Then the student is that of the run that was never stopped."""
    cache, one, two = caches["tiny-cross"], tmp_path / "one", tmp_path / "two"
    train_student(config(cache, one))
    trainer, _ = make_trainer(config(cache, two))

    def stop(item: int, *_: Any) -> None:
        if item == 6:
            raise KeyboardInterrupt

    trainer.at_item = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.train_resuming()
    broken = two / "checkpoints" / "checkpoint-99"  # was being written
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")
    changed = {"log_steps": 1, "checkpoint_steps": 2, "eval_steps": 3, "report_to": []}
    train_student(config(cache, two, run_name="again", **changed))
    assert {step for step in logged(two) if step > 6} == {7, 8, 9, 10, 11, 12}
    assert not broken.exists()
    finals = [json.loads((run / "history.json").read_text())["final"] for run in (one, two)]
    assert finals[0]["eval_heldout_nll"] == finals[1]["eval_heldout_nll"]


def test_a_tracker_is_told_all_settings_and_the_cache(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    """TensorBoard, in one folder whatever resumes; wandb and trackio log the same dictionary."""
    cache, out, how = caches["tiny-cross"], tmp_path / "my-run", {"type": "reverse_calm"}
    trainer, _ = make_trainer(config(cache, out, distillation=how, max_steps=4))
    told = trainer.args.to_dict()["tide"]
    assert told["distillation"]["type"] == "reverse_calm" and told["seed"] == 0
    assert told["cache_digest"] == load_manifest(cache).digest and told["teacher"] == "tiny-cross"
    assert trainer.args.run_name == "my-run"
    for steps in (4, 8):
        train_student(config(cache, out, distillation=how, max_steps=steps))
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    text = events.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
    assert load_manifest(cache).digest in text and "reverse_calm" in text
    assert {event.step for event in events.Scalars("train/loss")} == {1, 2, 4, 6, 8}
    assert not list((out / "checkpoints").rglob("events.out*"))
