"""Files on a disk that fills, and what device and precision a machine gets."""

import errno
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared.system import hardware
from shared.system.errors import TideError
from shared.system.files import atomic_file, remove_leftovers, temporary_path, write_bytes
from shared.system.hardware import choose_device, choose_precision

LIMIT = 100 << 10  # bytes
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
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *words], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT)),
        timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
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


CPU = torch.device("cpu")
X86 = platform.machine() in ("x86_64", "AMD64")


def test_auto_follows_the_hardware_and_what_was_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "bfloat16_in_hardware", lambda _device: True)
    assert choose_precision("auto", CPU) == "bfloat16"
    assert choose_precision("auto", CPU, "float32") == "float32"
    assert choose_precision("float32", CPU) == "float32"
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


@pytest.mark.skipif(not X86, reason="instruction sets of x86 are held back")
def test_a_process_held_to_avx2_takes_float32() -> None:
    """What most laptops are, also where this runs on something better."""
    held = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    code = "from shared.system.hardware import *; cpu = choose_device('cpu')\n"
    code += "print(choose_precision('auto', cpu))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=held)
    assert done.stdout.strip() == b"float32"
