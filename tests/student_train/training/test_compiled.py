"""Compiled layers and loss: the same values, and nothing compiled anew over batches of other
lengths.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "objective"),
    [("tiny-shared", {"type": "kl", "tidal": {}}), ("tiny-cross", {"type": "reverse_calm"})],
    ids=["kl", "reverse_calm"],
)
def test_a_compiled_run_has_the_losses_of_a_plain_one(
    caches: dict[str, Path], tmp_path: Path, teacher: str, objective: dict
) -> None:
    command = [sys.executable, "-m", "tests.student_train.training.compiled_run", str(caches[teacher]), str(tmp_path),
               json.dumps(objective)]  # fmt: skip
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    plain, compiled = (json.loads(done.stdout.splitlines()[-1])[way] for way in ("off", "on"))
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=2e-5)
    assert plain["graphs"][-1] == 0
    graphs = compiled["graphs"]
    assert graphs[1] == 2  # one for all layers, one for the loss
    assert (
        graphs[-1] <= 3
    )  # the loss once more where shapes met by chance; a dozen batches of other lengths: nothing
    assert graphs[-1] == graphs[6]  # the second epoch compiles nothing
