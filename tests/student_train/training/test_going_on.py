"""What a run may change when it goes on, what it says then, and what trackers are told of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.cache.manifest import load_manifest
from shared.system.errors import TideError
from student_train.training.trainer import make_trainer, train_student
from tests.student_train.training.test_trainer import config, curve


def losses(out: Path) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in curve(out) if "loss" in entry}


def test_the_logs_epoch_is_the_epoch(caches: dict[str, Path], tmp_path: Path) -> None:
    """Twenty-four examples in batches of 4 are six steps, whatever accumulates, however many draws
    share a step.
    """
    for name, changes in (
        ("accumulated", {"batch_size": 2, "accumulation": 2}),
        ("draws", {"draws_per_step": 2}),
    ):
        changes |= {"log_steps": 1, "checkpoint_steps": 12, "heldout": None}
        train_student(config(caches["tiny-cross"], tmp_path / name, **changes))
        epochs = {
            entry["step"]: entry["epoch"] for entry in curve(tmp_path / name) if "loss" in entry
        }
        assert epochs[6] == pytest.approx(1) and epochs[12] == pytest.approx(2), name


def test_a_run_is_extended(caches: dict[str, Path], tmp_path: Path) -> None:
    """At a constant rate it is the longer run, step for step; run.json and the curve say so."""
    cache, short = caches["tiny-cross"], tmp_path / "short"
    constant = {"schedule": "constant_with_warmup", "warmup_ratio": 0.0, "heldout": None}
    train_student(config(cache, tmp_path / "long", **constant))
    train_student(config(cache, short, max_steps=4, **constant))
    train_student(config(cache, short, **constant))
    assert losses(short) == losses(tmp_path / "long")
    assert json.loads((short / "run.json").read_text())["steps"] == 12
    train_student(config(cache, short, max_steps=-1, epochs=3, **constant))  # by epochs too
    assert curve(short)[-1]["step"] == 18
    for changes in ({"max_steps": 8}, {"max_steps": 16, "learning_rate": 1e-3}):
        with pytest.raises(TideError):
            train_student(config(cache, short, **{**constant, **changes}))


def test_how_a_run_is_looked_at_may_change(caches: dict[str, Path], tmp_path: Path) -> None:
    """Then the weights are those of the run that was never stopped."""
    cache = caches["tiny-cross"]
    train_student(config(cache, tmp_path / "one"))
    trainer, _ = make_trainer(config(cache, tmp_path / "two"))
    stop_after(trainer, 6)
    with pytest.raises(KeyboardInterrupt):
        trainer.train_resuming()
    changed = {
        "log_steps": 1,
        "checkpoint_steps": 2,
        "eval_steps": 3,
        "report_to": [],
        "run_name": "again",
    }
    train_student(config(cache, tmp_path / "two", **changed))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert {step for step in two if step > 6} == {7, 8, 9, 10, 11, 12}
    finals = [
        json.loads((tmp_path / name / "history.json").read_text())["final"]
        for name in ("one", "two")
    ]
    assert finals[0]["eval_heldout_nll"] == finals[1]["eval_heldout_nll"]
    assert one[2] == two[2]


def stop_after(trainer: Any, step: int) -> None:
    compute = trainer.compute_loss

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == step:
            raise KeyboardInterrupt
        return compute(*args, **kwargs)

    trainer.compute_loss = stopping


def test_a_tracker_is_told_all_settings_and_the_cache(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    """TensorBoard, in one folder whatever resumes; wandb and trackio log the same dictionary."""
    cache = caches["tiny-cross"]
    made = config(cache, tmp_path / "my-run", distillation={"type": "reverse_calm"}, max_steps=4)
    trainer, _ = make_trainer(made)
    told = trainer.args.to_dict()["tide"]
    assert told["distillation"]["type"] == "reverse_calm" and told["seed"] == 0
    assert told["cache_digest"] == load_manifest(cache).digest and told["teacher"] == "tiny-cross"
    assert trainer.args.run_name == "my-run"
    named, _ = make_trainer(config(cache, tmp_path / "other", run_name="mine"))
    assert named.args.run_name == "mine"
    train_student(made)
    train_student(
        config(cache, tmp_path / "my-run", distillation={"type": "reverse_calm"}, max_steps=8)
    )
    events = EventAccumulator(str(tmp_path / "my-run" / "tensorboard")).Reload()
    text = events.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
    assert load_manifest(cache).digest in text and "reverse_calm" in text
    assert {event.step for event in events.Scalars("train/loss")} == {1, 2, 4, 6, 8}
    assert not list((tmp_path / "my-run" / "checkpoints").rglob("events.out*"))
