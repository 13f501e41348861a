"""Runs of the trainer: every objective learns, and a run that is killed goes on float for float."""

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
from shared.settings.config import KL, Calm, ReverseCalm, Tidal, TrainConfig
from shared.system.errors import TideError
from student_train.training.preflight import check_objective
from student_train.training.resumable import whole_checkpoints
from student_train.training.trainer import train_student
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


@pytest.mark.parametrize(
    ("teacher", "objective"),
    [
        ("tiny-cross", {"type": "none"}),
        ("tiny-cross", {"type": "reverse_calm"}),
        ("tiny-shared", {"type": "kl", "tidal": {}}),
        ("tiny-shared", {"type": "reverse_kl"}),
        ("tiny-shared", {"type": "calm", "tidal": {"axis": "training_only"}}),
    ],
    ids=["none", "reverse_calm", "kl", "reverse_kl", "calm"],
)
def test_every_objective_trains_a_student_that_transformers_loads(
    caches: dict[str, Path], tmp_path: Path, teacher: str, objective: dict[str, Any]
) -> None:
    metrics = train_student(config(caches[teacher], tmp_path, distillation=objective))
    logged = [entry for entry in curve(tmp_path) if "loss" in entry]
    assert logged[-1]["denoise"] < logged[0]["denoise"]
    assert (logged[-1]["distillation"] == 0) == (objective["type"] == "none")
    assert ("tidal_lambda_train" in logged[-1]) == ("tidal" in objective)
    for entry in logged:
        assert entry["loss"] == pytest.approx(entry["denoise"] + entry["distillation"], rel=1e-4)
        assert 0 < entry.get("teacher_mass_in_topk", 1) <= 1
    assert 0 < metrics["eval_heldout_nll"] < 12
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.mask_token_id == tokenizer.mask_token_id
    assert model(torch.tensor([[1, 2, 3]])).logits.shape[:2] == (1, 3)


def test_killed_at_random_moments_and_restarted_the_curve_is_the_same(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    """kill -9, again and again, until a run gets through: every float of the history is the same,
    and the weights.
    """
    how = {"distillation": {"type": "kl", "tidal": {}}, "max_steps": 40}
    straight, out = tmp_path / "straight", tmp_path / "killed"
    train_student(config(caches["tiny-shared"], straight, **how))
    script = (
        "import json, sys, torch; torch.set_num_threads(int(sys.argv[1]))\n"
        "from tests.student_train.training.test_trainer import config, train_student\n"
        "train_student(config(sys.argv[2], sys.argv[3], **json.loads(sys.argv[4])))\n"
    )
    how["heldout"] = {"source": str(heldout_file()), "limit": 4}
    arguments = [str(torch.get_num_threads()), str(caches["tiny-shared"]), str(out)]
    command = [sys.executable, "-c", script, *arguments, json.dumps(how)]
    chance, kills = random.Random(1), 0
    for attempt in range(8):
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **output)  # type: ignore
        had, began = -1, time.monotonic()
        while process.poll() is None and time.monotonic() - began < 120:
            done = whole_checkpoints(out / "checkpoints")
            last = done[-1].step if done else 0
            had = last if had < 0 else had
            if attempt < 3 and last > had:  # it has moved on: kill it some steps later
                time.sleep(chance.uniform(0, 0.3))
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.02)
        said, _ = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, said.decode()[-3000:]
        kills += 1
    assert kills >= 1
    assert curve(out) == curve(straight)
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (out, straight)]
    assert weights[0] == weights[1]


def test_a_cache_of_another_tokenizer_is_refused(caches: dict[str, Path], tmp_path: Path) -> None:
    cache = Path(shutil.copytree(caches["tiny-cross"], tmp_path / "c"))
    shutil.rmtree(cache / "student_tokenizer")
    shutil.copytree(caches["tiny-shared"] / "student_tokenizer", cache / "student_tokenizer")
    with pytest.raises(TideError, match="tokenizer"):
        train_student(config(cache, tmp_path / "r"))
    assert not (tmp_path / "r").exists()


def test_objectives_that_the_cache_cannot_serve_and_one_the_paper_advises_against(
    caches: dict[str, Path],
) -> None:
    cross, shared = (load_manifest(caches[name]) for name in ("tiny-cross", "tiny-shared"))
    for objective, manifest, bare in (
        (KL(), cross, 0), (KL(temperature=3.0), shared, 0), (Calm(), cross, 10)
    ):  # fmt: skip
        with pytest.raises(TideError):
            check_objective(objective, manifest, Path("c"), 10, bare)
    check_objective(Calm(temperature=3.0), cross, Path("c"), 10, 3)  # chunks serve any temperature
    for objective, bare, said in ((ReverseCalm(tidal=Tidal()), 0, "TIDAL"), (Calm(), 6, "6")):
        with pytest.warns(UserWarning, match=said):
            check_objective(objective, shared, Path("c"), 10, bare)
    check_objective(KL(), shared, Path("c"), 10, 10)
