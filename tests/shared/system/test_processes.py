"""Two programs in one folder, programs that are told to stop, and programs whose parent is gone."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from shared.system.errors import TideError
from shared.system.processes import hold
from tests.conftest import chats_file
from tests.pipelines.evaluation.test_sandbox import processes_with

SECONDS = 60
TIDE = [sys.executable, "-m", "pipelines.cli"]
# Work that takes long.
GRID = """
seeds = [0, 1]
variants.plain.cache = "c"
[caches.c]
teacher = "tiny-cross"
data = {{ source = "{data}", limit = 24 }}
lengths = {{ student = 128, teacher = 128 }}
[train]
max_steps = 4000
epochs = 400
batch_size = 4
checkpoint_steps = 5
log_steps = 5
"""
NO_FLOCK = """
import errno, os
from filelock import FileLock
def none(self, *_, **__):
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
FileLock.acquire = none
"""
HOLD = """
import time
from pathlib import Path
from shared.system.processes import hold
with hold(Path({lock!r}), "it"):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def started(*arguments: str, until: Path) -> Iterator[subprocess.Popen[str]]:
    """`tide ARGUMENTS`, once a file below `until`'s folder matches its name."""
    process = subprocess.Popen(
        [*TIDE, *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 2 * SECONDS
        while not any(until.parent.rglob(until.name)) if until.parent.exists() else True:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def settings(text: str) -> list[str]:
    return [word for setting in text.split() for word in ("--set", setting)]


@pytest.mark.parametrize("flock", [True, False])
def test_a_lock_is_held_by_one_and_free_once_that_was_killed(
    flock: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the file system has no flock: then a file stands for the lock."""
    lock = tmp_path / "new" / ".lock"
    if not flock:
        monkeypatch.setattr(FileLock, "acquire", FileLock.acquire)  # given back at the end
        exec(NO_FLOCK, {})
    code = ("" if flock else NO_FLOCK) + HOLD.format(lock=str(lock))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(TideError, match=str(process.pid)), hold(lock, "it"):
        pass
    process.kill()
    process.communicate()
    with hold(lock, "it"), pytest.raises(TideError, match=str(os.getpid())), hold(lock, "it"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_the_children_of_an_ablation_end_with_it(sign: signal.Signals, tmp_path: Path) -> None:
    recipe, out = tmp_path / "grid.toml", tmp_path / "grid"
    recipe.write_text(GRID.format(data=chats_file()))
    command, child = ["ablate", str(recipe), "--out", str(out)], str(out / "plain-seed0")
    with started(*command, until=out / "progress.json") as process:
        assert processes_with(child)
        os.kill(process.pid, sign)
        _, said = process.communicate(timeout=SECONDS)
        assert process.returncode == (-sign if sign == signal.SIGKILL else 128 + sign)
        assert "Traceback" not in said
        deadline = time.monotonic() + 30
        while processes_with(child) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert processes_with(child) == []
    with started(*command, until=out / "progress.json"):  # nobody holds the folder any more
        pass


@pytest.mark.slow
def test_a_second_trainer_is_refused_and_the_first_stops_in_order(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ["train", "--teacher", "tiny-shared", "--cache", str(caches["tiny-shared"])]
    command += ["--out", str(out), *settings("max_steps=4000 epochs=400 batch_size=4 device=cpu")]
    command += settings("checkpoint_steps=5 log_steps=5 student.layers=1 student.hidden_size=32")
    with started(*command, until=out / "checkpoints" / "COMPLETE") as first:
        second = subprocess.run(
            [*TIDE, *command], capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert second.returncode == 2
        assert f"process {first.pid} of" in second.stderr
        first.terminate()
        _, said = first.communicate(timeout=SECONDS)
    assert first.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("signs", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)])
def test_a_cache_that_is_told_to_stop_says_so_in_its_status(
    signs: tuple[signal.Signals, ...], random_teacher: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c"
    command = ["cache", "--teacher", "tiny-shared", "--draws", "100", "--data", str(chats_file())]
    command += ["--model", str(random_teacher), "--out", str(out)]
    command += settings("shard_examples=1 lengths.student=128 lengths.teacher=128")
    command += settings("engine.device=cpu")
    with started(*command, until=out / "part-*.parquet") as process:
        for number, sign in enumerate(signs):
            time.sleep(0.05 * number)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, sign)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + signs[0]
    assert "Traceback" not in said
    if len(signs) == 1:
        assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    assert not list(out.glob(".student_tokenizer-*"))
