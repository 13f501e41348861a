"""Runs of the trainer: every objective learns, what is refused, and a run that is killed, or
continued with other settings, goes on float for float.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.cache.manifest import load_manifest
from shared.settings.build import build, to_plain
from shared.settings.config import KL, Calm, ReverseCalm, Tidal, TrainConfig
from shared.system import hardware, processes
from shared.system.files import TideError
from student_train.model import load_student
from student_train.training import trainer
from student_train.training.preflight import check_objective, recorded_run
from student_train.training.resumable import whole_checkpoints
from student_train.training.trainer import make_trainer, train_student
from tests.conftest import heldout_file


def config(cache: Path, out: Path, **changes: Any) -> TrainConfig:
    """Settings of a short run of a tiny student."""
    shape = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 32}
    values = {"cache": cache, "out": out, "student": shape, "max_steps": 12, "batch_size": 4}
    values |= {"learning_rate": 1e-2, "log_steps": 2, "checkpoint_steps": 4, "eval_steps": 6}
    values |= {"precision": "float32", "device": "cpu", "heldout_draws": 2}
    values |= {"heldout": {"source": str(heldout_file()), "limit": 4}}
    return build(TrainConfig, {**values, **changes})


def curve(out: Path) -> list[dict[str, Any]]:
    """The logged history without what a clock says."""
    steps = json.loads((out / "history.json").read_text())["steps"]
    clock = {"total_flos", "train_loss", "tokens_per_second"}
    entries = [entry for entry in steps if "train_runtime" not in entry]
    return [{k: v for k, v in entry.items() if k not in clock} for entry in entries]


def logged(out: Path, name: str = "loss") -> dict[int, float]:
    return {entry["step"]: entry[name] for entry in curve(out) if "loss" in entry}


@pytest.mark.parametrize("kind", ["none", "gold", "reverse_calm", "kl", "reverse_kl", "calm"])
def test_every_objective_learns(caches: dict[str, Path], tmp_path: Path, kind: str) -> None:
    teacher = "tiny-shared" if kind in ("gold", "kl", "calm") else "tiny-cross"
    tidal = {"kl": {"tidal": {}}, "calm": {"tidal": {"axis": "training_only"}}}.get(kind, {})
    run = config(caches[teacher], tmp_path, distillation={"type": kind, **tidal})
    metrics = train_student(run)
    logged = [entry for entry in curve(tmp_path) if "loss" in entry]
    assert logged[-1]["denoise"] < logged[0]["denoise"]
    assert (logged[-1]["distillation"] == 0) == (kind == "none")
    assert ("tidal_lambda_train" in logged[-1]) == bool(tidal)
    for entry in logged:
        assert entry["loss"] == pytest.approx(entry["denoise"] + entry["distillation"], rel=1e-4)
        assert 0 < entry.get("teacher_mass_in_topk", 1) <= 1
    assert 0 < metrics["eval_heldout_nll"] < 12
    card = (tmp_path / "model" / "README.md").read_text()
    assert load_manifest(caches[teacher]).digest in card and f'"type": "{kind}"' in card
    assert str(tmp_path) not in card and str(caches[teacher]) not in card
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.mask_token_id == tokenizer.mask_token_id
    assert model(torch.tensor([[1, 2, 3]])).logits.shape[:2] == (1, 3)


def test_a_killed_run_has_the_same_curve(caches: dict[str, Path], tmp_path: Path) -> None:
    """kill -9, again and again, until a run gets through: every float of the history is the same,
    and the weights.
    """
    how = {"distillation": {"type": "kl", "tidal": {}}, "max_steps": 24}
    straight, out = tmp_path / "straight", tmp_path / "killed"
    train_student(config(caches["tiny-shared"], straight, **how))
    command = [sys.executable, "-m", "tests.student_train.training.program"]
    command.append(json.dumps(to_plain(config(caches["tiny-shared"], out, **how))))

    def newest() -> list[int]:
        return [checkpoint.step for checkpoint in whole_checkpoints(out / "checkpoints")][-1:]

    chance, kills = random.Random(1), 0
    for attempt in range(3):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        had = newest()
        while attempt < 2 and newest() == had and process.poll() is None:
            time.sleep(0.02)
        if attempt < 2:  # it has moved on: kill it some steps later
            time.sleep(chance.uniform(0, 0.3))
            process.kill()
        said, _ = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, said.decode()[-3000:]
        kills += 1
    assert kills >= 1
    assert curve(out) == curve(straight)
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (out, straight)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_goes_on_where_it_was(
    sign: signal.Signals, caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any step, with every float of a run that was never told. Two at once are one; a second
    that comes later ends it.
    """
    cache, straight, out = caches["tiny-shared"], tmp_path / "straight", tmp_path / "told"
    how = {"distillation": {"type": "kl", "tidal": {}}, "log_steps": 3, "accumulation": 2}
    train_student(config(cache, straight, **how))
    assert [e["step"] for e in curve(straight) if "eval_heldout_nll" in e] == [0, 6, 12]

    def told(times: int, later: bool = False) -> None:
        trainer, _ = make_trainer(config(cache, out, **how))
        first = 2 * max([c.step for c in whole_checkpoints(out / "checkpoints")], default=0)

        def at_item(item: int, *_: Any) -> None:
            for _time in range(times if item == first + 2 else 0):
                signal.raise_signal(sign)
                trainer.asked[0] -= 2 * later

        trainer.at_item = at_item
        with pytest.raises(KeyboardInterrupt):
            trainer.train_resuming()

    monkeypatch.setattr(processes, "_received", [])  # another test may have had one here
    before = signal.signal(sign, signal.default_int_handler)
    for times, later, step in ((1, False, 2), (2, False, 4), (2, True, 4), (1, False, 6)):
        told(times, later)
        assert whole_checkpoints(out / "checkpoints")[-1].step == step
    signal.signal(sign, before)
    train_student(config(cache, out, **how))
    assert curve(out) == curve(straight)
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (out, straight)]
    assert weights[0] == weights[1]


def test_the_logs_epoch_is_the_epoch(caches: dict[str, Path], tmp_path: Path) -> None:
    """Twenty-four examples in batches of 4 are six steps, whatever accumulates or shares a step."""
    adafactor = {"draws_per_step": 2, "optimizer": "adafactor"}
    for changes in ({"batch_size": 2, "accumulation": 2}, adafactor):
        out = tmp_path / str(changes.get("optimizer"))
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
    assert recorded_run(short)["steps"] == 12
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
    trainer.at_item = Mock(side_effect=[None] * 6 + [KeyboardInterrupt])
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


def test_what_a_run_is_of_may_move(
    caches: dict[str, Path], student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cache, checkpoint and held-out file are known by their content, wherever they lie."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(caches["tiny-cross"], "c")
    shutil.copytree(student, "s")
    shutil.copyfile(heldout_file(), "h.jsonl")
    other = heldout_file().read_text().splitlines(keepends=True)[4:]
    Path("other.jsonl").write_text("".join(other))

    def go(steps: int, cache: str, checkpoint: str, source: str) -> None:
        places: dict[str, Any] = {"heldout": {"source": source, "limit": 4}}
        places["student"] = {"checkpoint": checkpoint}
        constant = {"schedule": "constant_with_warmup", "warmup_ratio": 0.0}
        train_student(config(Path(cache), tmp_path / "r", max_steps=steps, **places, **constant))

    go(2, "c", "s", "h.jsonl")
    go(4, str(tmp_path / "c"), f"{tmp_path}/s", f"{tmp_path}/h.jsonl")
    for old, new in (("c", "c2"), ("s", "s2"), ("h.jsonl", "h2.jsonl")):
        Path(old).rename(new)
    go(6, "c2", "s2", "h2.jsonl")
    with pytest.raises(TideError, match="heldout"):
        go(8, "c2", "s2", "other.jsonl")
    with pytest.raises(TideError, match="student"):
        go(8, "c2", "embedded:student_train/tiny_students/cross", "h2.jsonl")


def test_a_tracker_is_told_all_settings(caches: dict[str, Path], tmp_path: Path) -> None:
    """TensorBoard, in one folder whatever resumes; wandb and trackio log the same dictionary."""
    cache, out, how = caches["tiny-cross"], tmp_path / "my-run", {"type": "reverse_calm"}
    for steps in (4, 8):
        train_student(config(cache, out, distillation=how, max_steps=steps))
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    text = events.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
    for told in (load_manifest(cache).digest, "reverse_calm", "tiny-cross", "my-run"):
        assert told in text
    assert {event.step for event in events.Scalars("train/loss")} == {1, 2, 4, 6, 8}
    assert not list((out / "checkpoints").rglob("events.out*"))


def test_a_run_keeps_the_precision_that_it_was_begun_with(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = config(caches["tiny-cross"], tmp_path / "r", precision="auto")
    monkeypatch.setattr(hardware, "bfloat16_in_hardware", lambda _device: False)
    make_trainer(auto)
    assert recorded_run(auto.out)["config"]["precision"] == "float32"
    monkeypatch.setattr(hardware, "bfloat16_in_hardware", lambda _device: True)
    trainer, _ = make_trainer(auto)
    assert not trainer.args.bf16
    with pytest.raises(TideError, match="precision"):
        make_trainer(config(caches["tiny-cross"], tmp_path / "r", precision="bfloat16"))


def test_objectives_that_the_cache_cannot_serve_are_refused(caches: dict[str, Path]) -> None:
    cross, shared = (load_manifest(caches[name]) for name in ("tiny-cross", "tiny-shared"))
    for objective, bare in ((KL(), 0), (Calm(), 10)):
        with pytest.raises(TideError):
            check_objective(objective, cross, Path("c"), 10, bare, False)
    check_objective(Calm(temperature=3.0), cross, Path("c"), 10, 3, False)
    check_objective(KL(), cross, Path("c"), 10, 3, True)
    for objective, bare, said in ((ReverseCalm(tidal=Tidal()), 0, "TIDAL"), (Calm(), 6, "6")):
        with pytest.warns(UserWarning, match=said):
            check_objective(objective, shared, Path("c"), 10, bare, False)
    check_objective(KL(temperature=3.0), shared, Path("c"), 10, 10, False)


def test_what_does_not_fit_is_refused_at_once(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}
    for named, changes, environment in (
        ("wandb", {"report_to": ["wandb"]}, {}), ("adamw_8bit", {"optimizer": "adamw_8bit"}, {}),
        ("draws_per_step", {"draws_per_step": 4}, {}), ("multi_gpu", {}, launched),
    ):  # fmt: skip
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(TideError, match=named):
            make_trainer(config(caches["tiny-cross"], tmp_path / "r", **changes))
        monkeypatch.delenv("MASTER_ADDR", raising=False)

    def short(*args: Any) -> Any:
        model, found = load_student(*args)
        model.config.max_position_embeddings = 127  # of the 128 that a row may have
        return model, found

    monkeypatch.setattr(trainer, "load_student", short)
    with pytest.raises(TideError, match="127 positions"):
        make_trainer(config(caches["tiny-cross"], tmp_path / "r"))
    assert not (tmp_path / "r").exists()
