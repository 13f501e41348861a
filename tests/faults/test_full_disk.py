"""A full disk, made by a limit on the size of files: libraries say it in their own words."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 100 << 10  # bytes
TRAIN = "train --teacher tiny-shared --cache {C} --out {O} --set device=cpu --set heldout.limit=2"
TRAIN += " --set max_steps=4 --set batch_size=2 --set checkpoint_steps=2 --set log_steps=2"
CACHE = "cache --teacher tiny-shared --set data.limit=4 --set engine.device=cpu --out {O}"


@pytest.mark.slow
@pytest.mark.parametrize("command", [TRAIN, CACHE, "export {S} {O}"])
def test_is_one_explained_error(command: str, caches: dict[str, Path], tmp_path: Path) -> None:
    words = command.format(
        S="embedded:student_train/tiny_students/shared", C=caches["tiny-shared"], O=tmp_path / "o"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *words.split()], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT)),
        timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("tide: error: the disk is full") == 1
    assert "Traceback" not in done.stderr
