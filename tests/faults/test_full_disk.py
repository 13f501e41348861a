"""A disk that is full, made by a limit on the size of files: libraries say it in their own words."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
TRAIN = (
    "train --teacher tiny-shared --cache {C} --out {O} --set max_steps=4 --set batch_size=2 --set checkpoint_steps=2 \
--set log_steps=2 --set device=cpu --set heldout.limit=2"
)


@pytest.mark.parametrize(
    ("command", "limit"),
    [
        (TRAIN, 100 << 10),
        ("export {S} {O}", 100 << 10),
        ("prune {C} --out {O} --k 4", 4 << 10),
        (
            "cache --teacher tiny-shared --set data.limit=4 --set engine.device=cpu --out {O}",
            100 << 10,
        ),
    ],
)
def test_is_one_explained_error(
    command: str, limit: int, caches: dict[str, Path], tmp_path: Path
) -> None:
    names = {
        "S": "embedded:student_train/tiny_students/shared",
        "C": str(caches["tiny-shared"]),
        "O": str(tmp_path / "o"),
    }

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    found = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *(word.format(**names) for word in command.split())],
        capture_output=True, text=True, preexec_fn=small, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert found.returncode == 2, found.stderr
    assert (
        found.stderr.count("tide: error")
        == found.stderr.count("tide: error: the disk is full")
        == 1
    )
    assert "Traceback" not in found.stderr
