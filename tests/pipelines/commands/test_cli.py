"""The command: the whole way through it, and what it answers where it refuses."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import app, main
from shared.cache.shards import finished_units
from tests.conftest import chats_file, heldout_file

SMALL = ("shard_examples=8", "lengths.student=128", "lengths.teacher=128", "data.limit=24",
         "engine.device=cpu")  # fmt: skip
TRAIN = ("max_steps=2", "batch_size=4", "checkpoint_steps=2", "log_steps=1", "device=cpu",
         "student.layers=1", f"heldout.source={heldout_file()}", "heldout.limit=2")  # fmt: skip


def small_cache(model: Path, out: Path, *settings: str) -> list[str]:
    """The words of `tide cache` for a small cache of the random teacher."""
    sets = [word for setting in (*SMALL, *settings) for word in ("--set", setting)]
    return ["cache", "--model", str(model), "--data", str(chats_file()), "--out", str(out), *sets]


def tide(*arguments: str) -> str:
    """What the command prints."""
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def failed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[object, str]:
    """Exit code and stderr."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["tide", *arguments])
    monkeypatch.setattr(sys, "stderr", stderr)
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, stderr.getvalue()


def test_cache_then_train_then_report(random_teacher: Path, tmp_path: Path) -> None:
    cache = small_cache(random_teacher, tmp_path / "c")
    planned = tide(*cache, "--dry-run")
    assert "measured on the first 24 examples under 3 draws" in planned
    assert not (tmp_path / "c" / "manifest.json").exists()
    assert "3 shards computed, 0 kept" in tide(*cache, "--draws", "1")
    assert "3 shards computed, 3 kept" in tide(*cache, "--draws", "2")
    train = ["train", "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "r"), "--seed", "1"]
    sets = [word for setting in TRAIN for word in ("--set", setting)]
    assert "eval_heldout_nll" in tide(*train, *sets)
    assert "reverse_calm, T 5.0" in tide("report", str(tmp_path))
    assert (tmp_path / "report.png").stat().st_size > 10_000


REFUSED = [
    ("cache --teacher llada", "llada"),  # one a kind: a teacher that is not known, by a flag,
    ("cache --config recipe.toml --teacher llada", "llada"),  # beside a recipe,
    ("train --teacher mine", "mine"),  # in stage two,
    ("teachers show none", "none"),  # or to be shown
    ("recipes show none", "none"),
    ("cache --config wrong.toml", "learning_rate"),  # a misspelt setting of the other stage
    ("cache --set engine.device=cuda:7", "cuda:7"),  # hardware that is not there
    ("cache --set data.source=/nowhere.jsonl", "/nowhere.jsonl"),  # places that are not there
    ("cache --out /proc/x", "/proc/x"),  # or are not to be written
    ("plan --teacher llada-8b --response nan", "--response"),  # a number that cannot be
    ("plan --no-such-option", "--no-such-option"),  # Typer's own
    ("report /nowhere\x1b]0;evil\x07", "/nowhere"),  # text that would obey itself
]


@pytest.mark.parametrize(("command", "name"), REFUSED, ids=[c.split("\x1b")[0] for c, _ in REFUSED])
def test_what_cannot_be_is_one_message_and_exit_code_two(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text('[cache]\nteacher = "tiny-cross"\n')
    (tmp_path / "wrong.toml").write_text("[train]\nlearning_rte = 1e-4\n")
    code, said = failed(monkeypatch, *command.split())
    assert code == 2 and name in said
    assert "Traceback" not in said and "\x1b" not in said and "\x07" not in said
    assert sum(line.startswith("tide: error") for line in said.splitlines()) <= 1


def test_copies_beyond_the_visible_gpus_do_not_run_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "0,1")
    words = ["cache", "--out", str(tmp_path / "c"), "--data-parallel", "4"]
    code, said = failed(monkeypatch, *words)
    assert code == 2 and "CUDA_VISIBLE_DEVICES=0,1" in said


QUICK = """
import contextlib, io, sys
from pipelines.cli import main
for words in ("cache --teacher llada8b", "cache --set noise.drws=3", "train --set epochz=3",
              "teachers", "teachers show wedlm", "recipes", "recipes show cross", "--help"):
    sys.argv = ["tide", *words.split()]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit:
            pass
print([name for name in ("torch", "transformers", "sklearn", "pandas") if name in sys.modules])
"""


def test_what_needs_no_model_imports_no_model_library() -> None:
    done = subprocess.run([sys.executable, "-c", QUICK], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_ctrl_c_says_how_to_go_on(random_teacher: Path, tmp_path: Path) -> None:
    command = small_cache(random_teacher, tmp_path / "c", "shard_examples=1", "noise.draws=40")
    words = [sys.executable, "-m", "pipelines.cli", *command]
    hidden = subprocess.DEVNULL
    process = subprocess.Popen(words, text=True, stderr=subprocess.PIPE, stdout=hidden)
    began = time.monotonic()
    while not finished_units(tmp_path / "c") and time.monotonic() - began < 120:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in errors and "Traceback" not in errors
    assert not list((tmp_path / "c").rglob(".*.tide-tmp"))


@pytest.mark.slow
def test_plans_and_throughput(random_teacher: Path) -> None:
    assert "8.02 B parameters" in tide("plan", "--teacher", "llada-8b")
    # 1000 examples × 2 draws × 2 passes × 100 tokens
    stated = "plan --teacher llada2-mini --examples 1000 --tokens 100 --draws 2"
    hours = tide(*stated.split(), "--tokens-per-second", "1000")
    assert "GPU hours 0.1 at 1,000 tokens/s" in " ".join(hours.split())
    small = "throughput --length 32 --requests 4 --tflops 1 --model"
    speed = tide(*small.split(), str(random_teacher))
    assert "4 passes of 32 tokens" in speed and "of 1 TFLOP/s" in speed
