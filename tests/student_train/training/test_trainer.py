from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.cache.manifest import load_manifest
from shared.settings.build import build
from shared.settings.config import TrainConfig
from shared.settings.objectives import KL, Calm, ReverseCalm, ReverseKL, Tidal
from shared.system.errors import TideError
from student_train.training.preflight import check_objective
from student_train.training.resumable import whole_checkpoints
from student_train.training.trainer import train_student
from tests.conftest import heldout_file

STUDENT = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "intermediate_size": 32}


def config(cache: Path, out: Path, **changes: Any) -> TrainConfig:
    values = {
        "cache": cache,
        "out": out,
        "student": STUDENT,
        "max_steps": 12,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "log_steps": 2,
        "checkpoint_steps": 4,
        "eval_steps": 6,
        "precision": "float32",
        "device": "cpu",
        "heldout": {"source": str(heldout_file()), "limit": 4},
        "heldout_draws": 2,
        **changes,
    }
    return build(TrainConfig, values)


def curve(out: Path) -> list[dict[str, Any]]:
    """The logged history without what a clock says."""
    steps = json.loads((out / "history.json").read_text())["steps"]
    clock = {"train_runtime", "train_steps_per_second", "total_flos", "train_loss"}
    clock.add("tokens_per_second")
    entries = [entry for entry in steps if "train_runtime" not in entry]
    return [{k: v for k, v in entry.items() if k not in clock} for entry in entries]


CASES = [
    ("tiny-cross", {"type": "none"}),
    ("tiny-cross", {"type": "reverse_calm"}),
    ("tiny-shared", {"type": "kl", "tidal": {}}),
    ("tiny-shared", {"type": "reverse_kl"}),
    ("tiny-shared", {"type": "calm", "tidal": {"axis": "training_only"}}),
]


@pytest.mark.parametrize(("teacher", "objective"), CASES, ids=lambda x: str(x).replace("'", ""))
def test_every_objective_trains(
    caches: dict[str, Path], tmp_path: Path, teacher: str, objective: dict[str, Any]
) -> None:
    metrics = train_student(config(caches[teacher], tmp_path, distillation=objective))
    logged = [entry for entry in curve(tmp_path) if "loss" in entry]
    assert logged[-1]["denoise"] < logged[0]["denoise"]
    assert (logged[-1]["distillation"] == 0) == (objective["type"] == "none")
    assert ("tidal_lambda_train" in logged[-1]) == ("tidal" in objective)
    for entry in logged:
        assert entry["loss"] == pytest.approx(entry["denoise"] + entry["distillation"], rel=1e-4)
    assert 0 < metrics["eval_heldout_nll"] < 12
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents*"))


def test_the_result_loads_with_transformers_alone(caches: dict[str, Path], tmp_path: Path) -> None:
    train_student(config(caches["tiny-cross"], tmp_path, max_steps=2))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.model_type == "qwen3"
    assert model.config.mask_token_id == tokenizer.mask_token_id == 2047
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 2048)


def test_killed_at_random_moments_and_restarted_the_curve_is_the_same(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    """kill -9, again and again, until a run gets through: every float of the history is the same,
    and the weights.
    """
    kl = {"type": "kl", "tidal": {}}
    train_student(
        config(caches["tiny-shared"], tmp_path / "straight", distillation=kl, max_steps=40)
    )
    settings = config(caches["tiny-shared"], tmp_path / "killed", distillation=kl, max_steps=40)
    script = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[1]))\n"
        "from tests.student_train.training.test_trainer import config, train_student\n"
        "from pathlib import Path\n"
        "train_student(config(Path(sys.argv[2]), Path(sys.argv[3]), distillation={'type': 'kl', "
        "'tidal': {}}, "
        "max_steps=40, heldout={'source': sys.argv[4], 'limit': 4}))\n"
    )
    command = [
        sys.executable,
        "-c",
        script,
        str(torch.get_num_threads()),
        str(settings.cache),
        str(settings.out),
    ]
    chance, kills = random.Random(1), 0
    for attempt in range(8):
        process = subprocess.Popen(
            [*command, str(heldout_file())], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        checkpoints, had, began = settings.out / "checkpoints", -1, time.monotonic()
        while process.poll() is None and time.monotonic() - began < 120:
            done = whole_checkpoints(checkpoints)
            last = done[-1].step if done else 0
            had = last if had < 0 else had
            if attempt < 3 and last > had:  # it has moved on: kill it some steps later
                time.sleep(chance.uniform(0, 0.3))
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.02)
        output, _ = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output.decode()[-3000:]
        kills += 1
    assert kills >= 1
    assert curve(settings.out) == curve(tmp_path / "straight")
    weights = [
        (run / "model" / "model.safetensors").read_bytes()
        for run in (settings.out, tmp_path / "straight")
    ]
    assert weights[0] == weights[1]


def test_a_checkpoint_that_was_being_written_is_not_resumed_from(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    settings = config(caches["tiny-cross"], tmp_path / "a")
    train_student(settings)
    expected = curve(settings.out)
    broken = settings.out / "checkpoints" / "checkpoint-99"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")
    (settings.out / "history.json").unlink()
    train_student(settings)
    assert not broken.exists()
    assert curve(settings.out) == expected


def test_a_cache_of_another_tokenizer_or_without_shards(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(caches["tiny-cross"], tmp_path / "c"))
    shutil.rmtree(cache / "student_tokenizer")
    shutil.copytree(caches["tiny-shared"] / "student_tokenizer", cache / "student_tokenizer")
    with pytest.raises(TideError, match="tokenizer"):
        train_student(config(cache, tmp_path / "r"))
    assert not (tmp_path / "r").exists()


def test_objectives_that_the_cache_cannot_serve(caches: dict[str, Path]) -> None:
    cross, shared = (load_manifest(caches[name]) for name in ("tiny-cross", "tiny-shared"))
    for settings in (KL(), ReverseKL()):
        with pytest.raises(TideError, match="kl"):
            check_objective(settings, cross, Path("c"))
    with pytest.raises(TideError, match="3"):
        check_objective(KL(temperature=3.0), shared, Path("c"))
    check_objective(
        Calm(temperature=3.0), cross, Path("c")
    )  # chunk likelihoods serve any temperature


def test_tidal_with_a_reverse_objective_works_and_warns(caches: dict[str, Path]) -> None:
    for settings in (ReverseKL(tidal=Tidal()), ReverseCalm(tidal=Tidal())):
        with pytest.warns(UserWarning, match="TIDAL"):
            check_objective(settings, load_manifest(caches["tiny-shared"]), Path("c"))
