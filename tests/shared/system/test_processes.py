"""Two programs in one folder, and programs that are told to stop or whose parent is gone; files on
a disk that fills; what device and precision a machine gets.
"""

import contextlib
import errno
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from shared.system import hardware
from shared.system.files import (
    TideError,
    atomic_file,
    remove_leftovers,
    temporary_path,
    write_bytes,
)
from shared.system.hardware import choose_device, choose_precision
from shared.system.processes import hold
from tests.conftest import chats_file
from tests.pipelines.evaluation.test_sandbox import processes_with

SECONDS = 60
TIDE = [sys.executable, "-m", "pipelines.cli"]
CPU = torch.device("cpu")
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
import warnings
from pathlib import Path
from shared.system.processes import hold
with hold(Path({lock!r}), "it"):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def started(*arguments: str, until: Path) -> Iterator[subprocess.Popen[str]]:
    """`tide ARGUMENTS`, once a file below `until`'s folder matches its name."""
    pipes: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*TIDE, *arguments], start_new_session=True, **pipes)
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
    child = str(out / "plain-seed0")
    with started("ablate", str(recipe), "--out", str(out), until=out / "progress.json") as process:
        assert processes_with(child)
        os.kill(process.pid, sign)
        _, said = process.communicate(timeout=SECONDS)
        assert process.returncode == (-sign if sign == signal.SIGKILL else 128 + sign)
        assert "Traceback" not in said
        deadline = time.monotonic() + 30
        while processes_with(child) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert processes_with(child) == []


@pytest.mark.slow
def test_a_second_trainer_is_refused_and_the_first_stops_in_order(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ["train", "--teacher", "tiny-shared", "--cache", str(caches["tiny-shared"])]
    command += ["--out", str(out), *settings("max_steps=4000 epochs=400 batch_size=4 device=cpu")]
    command += settings("checkpoint_steps=5 log_steps=5 student.layers=1 student.hidden_size=32")
    with started(*command, until=out / "checkpoints" / "COMPLETE") as first:
        again: Any = {"capture_output": True, "text": True, "timeout": SECONDS}
        second = subprocess.run([*TIDE, *command], check=False, **again)
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


TRAIN = "train --teacher tiny-shared --cache {C} --out {O} --set device=cpu --set heldout.limit=2"
TRAIN += " --set max_steps=2 --set batch_size=2 --set checkpoint_steps=2 --set log_steps=2"
CACHE = "cache --teacher tiny-shared --set data.limit=4 --set engine.device=cpu --out {O}"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(TideError), atomic_file(path) as handle:  # noqa: PT012
        handle.write(b"half of the new")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as handle:
        raise KeyboardInterrupt
    with pytest.raises(TideError):
        write_bytes(path / "inside", b"x")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.parametrize("command", [TRAIN, CACHE, "export {S} {O}"])
def test_a_full_disk_is_one_explained_error(
    command: str, caches: dict[str, Path], tmp_path: Path
) -> None:
    """Made by a limit on the size of files: libraries say it in their own words."""
    student = "embedded:student_train/tiny_students/shared"
    words = command.format(S=student, C=caches["tiny-shared"], O=tmp_path / "o").split()
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100 << 10, 100 << 10))
    options: Any = {"capture_output": True, "text": True, "preexec_fn": limit, "cwd": tmp_path}
    done = subprocess.run([*TIDE, *words], timeout=120, check=False, **options)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("tide: error: the disk is full") == 1
    assert "Traceback" not in done.stderr


def test_leftovers_of_a_killed_process_go_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "draw=00"
    (folder / "x.tmp").mkdir(parents=True)
    half = temporary_path(folder / "part-00000.parquet")
    assert half != temporary_path(folder / "part-00000.parquet")
    half.write_bytes(b"half")
    kept = ["part-00001.parquet", "chapter.tmp", ".chapter.tmp", ".notes.tide-tmp", "x.tide-tmp"]
    for name in kept:
        (folder / name).write_bytes(b"mine")
    remove_leftovers([tmp_path])
    assert sorted(p.name for p in folder.iterdir()) == sorted([*kept, "x.tmp"])
    half.write_bytes(b"half")
    remove_leftovers([folder / "part-00001.parquet"])
    assert half.exists()
    remove_leftovers([folder / "part-00000.parquet"])
    assert not half.exists()


def test_auto_follows_the_hardware_and_what_was_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "bfloat16_in_hardware", lambda _device: True)
    assert choose_precision("auto", CPU) == "bfloat16"
    assert choose_precision("auto", CPU, "float32") == "float32"
    assert choose_precision("bfloat16", CPU) == "bfloat16"  # and no warning: it would be an error
    monkeypatch.setattr(hardware, "bfloat16_in_hardware", lambda _device: False)
    assert choose_precision("auto", CPU) == "float32"
    # What was asked for stays; the fingerprint refuses it.
    assert choose_precision("float32", CPU, "bfloat16") == "float32"
    for asked, begun in (("bfloat16", None), ("auto", "bfloat16")):
        with pytest.warns(UserWarning, match="bfloat16"):
            assert choose_precision(asked, CPU, begun) == "bfloat16"


def test_a_device_that_is_not_there_is_explained() -> None:
    assert choose_device("cpu") == CPU
    for name in ("nonsense:x", "xpu:7", "cuda:99"):
        with pytest.raises(TideError):
            choose_device(name)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="held back is x86")
def test_a_card_that_torch_does_not_see_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.warns(UserWarning, match="driver"):
        assert choose_device("auto") == CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    with warnings.catch_warnings(action="error"):
        choose_device("auto")


def test_a_process_held_to_avx2_takes_float32() -> None:
    held = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    code = "from shared.system.hardware import *; cpu = choose_device('cpu')\n"
    code += "print(choose_precision('auto', cpu))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=held)
    assert done.stdout.strip() == b"float32"
