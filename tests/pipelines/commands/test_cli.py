from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.cache.shards import finished_units
from tests.conftest import STUDENT_TOKENIZER, chats_file, heldout_file


def tide(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


CACHE = ["--set", "shard_examples=8", "--set", "lengths.student=128", "--set", "lengths.teacher=128",
         "--set", "data.limit=24", "--set", "engine.device=cpu"]  # fmt: skip


def test_cache_then_train_from_the_command_line(random_teacher: Path, tmp_path: Path) -> None:
    cache = [
        "cache",
        "--model",
        str(random_teacher),
        "--data",
        str(chats_file()),
        "--out",
        str(tmp_path / "c"),
        *CACHE,
    ]
    first = tide(*cache, "--draws", "1")
    assert first.returncode == 0, first.stderr
    assert "3 shards computed, 0 kept" in first.stdout
    second = tide(*cache, "--draws", "2")
    assert "3 shards computed, 3 kept" in second.stdout
    train = ["train", "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "r"), "--seed", "1"]
    for setting in ("max_steps=2", "batch_size=4", "checkpoint_steps=2", "log_steps=1", "device=cpu",
                    "student.layers=1", f"heldout.source={heldout_file()}", "heldout.limit=2"):  # fmt: skip
        train += ["--set", setting]
    trained = tide(*train)
    assert trained.returncode == 0, trained.stderr
    assert "eval_heldout_nll" in trained.stdout
    report = tide("report", str(tmp_path))
    assert report.returncode == 0, report.stderr
    assert "reverse_calm, T 5.0" in report.stdout
    assert (tmp_path / "report.png").stat().st_size > 10_000


REFUSED = [
    (["cache", "--teacher", "llada"], "unknown teacher 'llada'"),
    (["cache", "--set", "targets.k=0"], "targets.k is 0"),
    (["cache", "--set", "data.source=/nowhere.jsonl"], "there is no data file"),
    (["cache", "--config", "/nowhere.toml"], "cannot read /nowhere.toml"),
    (["cache", "--teacher", "llada-8b", "--model", "/nowhere"], "there is no folder /nowhere"),
    (["train", "--cache", "/nowhere"], "is no cache"),
    (["train", "--teacher", "mine"], "unknown teacher 'mine'"),
    (["cache", "--random-weights"], "--random-weights makes no cache"),
    (["plan", "--teacher", "llada-8b", "--response", "2"], "--response is 2"),
    (
        ["cache", "--set", "engine.quantization=int8", "--set", "engine.device_map=auto"],
        "do not go together",
    ),
    (["report", "/nowhere"], "holds no finished runs"),
    (["plan", "--no-such-option"], "No such option"),
]
ONE_BY_ONE = """
import contextlib, io, json, sys
from pipelines.cli import main
found = []
for arguments in json.load(sys.stdin):
    sys.argv, said = ["tide", *arguments], io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as stop:
            found.append((stop.code, said.getvalue()))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, str]]:
    """Exit code and words of each of `REFUSED`, one after the other in one process: starting takes most of the time."""
    out = ["--out", str(tmp_path_factory.mktemp("refused") / "out")]
    each = [
        [*arguments, *(out if arguments[0] in ("cache", "train") else [])]
        for arguments, _ in REFUSED
    ]
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE],
        input=json.dumps(each),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(REFUSED)
    return found


@pytest.mark.parametrize(
    "number", range(len(REFUSED)), ids=[" ".join(arguments) for arguments, _ in REFUSED]
)
def test_bad_input_is_a_message_and_exit_code_two(
    refused: list[tuple[int, str]], number: int
) -> None:
    code, said = refused[number]
    assert code == 2
    assert REFUSED[number][1] in said
    assert "Traceback" not in said


def test_the_exit_code_is_the_process_own() -> None:
    done = tide("plan", "--teacher", "llada-8b", "--response", "2")
    assert done.returncode == 2 and done.stderr.startswith("tide: error: --response is 2")


def test_ctrl_c_says_how_to_go_on(random_teacher: Path, tmp_path: Path) -> None:
    command = ["cache", "--model", str(random_teacher), "--data", str(chats_file()), "--out", str(tmp_path / "c"),
               "--draws", "40", *CACHE, "--set", "shard_examples=1"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    began = time.monotonic()
    while not finished_units(tmp_path / "c") and time.monotonic() - began < 120:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "c").rglob(".*.tide-tmp"))


def test_teachers_are_listed_and_shown() -> None:
    result = tide("teachers")
    assert result.returncode == 0
    assert "llada" in result.stdout
    shown = tide("teachers", "show", "wedlm-8b")
    assert shown.returncode == 0
    assert "Qwen3ForCausalLM" in shown.stdout
    assert "151665" in shown.stdout
    unknown = tide("teachers", "show", "wedlm")
    assert unknown.returncode == 2
    assert "did you mean wedlm-8b" in unknown.stderr


def test_a_student_is_exported(golden: Path, tmp_path: Path) -> None:
    wrong = tide("export", str(tmp_path), str(tmp_path / "x"), "--format", "gguf")
    assert wrong.returncode == 2
    assert "unknown format 'gguf'" in wrong.stderr
    source = tmp_path / "s"
    source.mkdir()
    for file in (*(golden / "a2d_qwen3").glob("[cm]*"), *STUDENT_TOKENIZER.iterdir()):
        shutil.copyfile(file, source / file.name)
    done = tide("export", str(source), str(tmp_path / "hf"), "--format", "hf")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "qwen3"


@pytest.mark.slow
def test_plans_and_throughput(random_teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    plan = tide("cache", "--model", str(random_teacher), "--data", str(chats_file()), "--out", str(out), *CACHE,
                "--dry-run")  # fmt: skip
    assert plan.returncode == 0, plan.stderr
    assert "measured on the first 24 examples under 3 draws" in plan.stdout
    assert not (out / "manifest.json").exists()
    dry = tide("cache", "--teacher", "llada-8b", "--random-weights", "--dry-run")
    assert "8.02 B parameters" in dry.stdout
    assert "stated: 512 tokens an example" in dry.stdout
    stated = [
        "plan",
        "--teacher",
        "llada2-mini",
        "--examples",
        "1000",
        "--tokens",
        "100",
        "--draws",
        "2",
    ]
    hours = tide(
        *stated, "--tokens-per-second", "1000"
    )  # 1000 examples × 2 draws × 2 passes × 100 tokens
    assert "GPU hours         0.1 at 1,000 tokens/s" in hours.stdout
    speed = tide(
        "throughput",
        "--model",
        str(random_teacher),
        "--length",
        "32",
        "--requests",
        "4",
        "--tflops",
        "1",
    )
    assert speed.returncode == 0, speed.stderr
    assert "4 passes of 32 tokens" in speed.stdout
    assert "of 1 TFLOP/s" in speed.stdout
