"""A run, and a cache, keep the precision that they were begun with, whatever machine they go on
with.
"""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from shared.cache.manifest import load_manifest
from shared.system import hardware
from shared.system.errors import TideError
from student_train.training.trainer import make_trainer
from teacher_cache.run.build import build_cache
from tests.conftest import files, small_cache_config
from tests.student_train.training.test_trainer import config


def machine(monkeypatch: pytest.MonkeyPatch, bfloat16: bool) -> None:
    monkeypatch.setattr(hardware, "bfloat16_in_hardware", lambda _device: bfloat16)


@pytest.mark.parametrize("begun", [True, False])
def test_a_run(
    begun: bool, caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = config(caches["tiny-cross"], tmp_path / "r", precision="auto")
    machine(monkeypatch, begun)
    make_trainer(auto)
    first, other = ("bfloat16", "float32") if begun else ("float32", "bfloat16")
    assert json.loads((tmp_path / "r" / "run.json").read_text())["config"]["precision"] == first
    machine(monkeypatch, not begun)
    with pytest.warns(UserWarning, match="bfloat16") if begun else nullcontext():
        trainer, _ = make_trainer(auto)
    assert trainer.args.bf16 == begun
    machine(monkeypatch, True)
    with pytest.raises(TideError, match="precision"):
        make_trainer(config(caches["tiny-cross"], tmp_path / "r", precision=other))


def test_a_cache(
    caches: dict[str, Path], random_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "c"
    auto = small_cache_config("tiny-cross", random_teacher, out, engine={"device": "cpu"})
    machine(monkeypatch, False)
    build_cache(auto)
    assert load_manifest(out).fingerprint.engine.dtype == "float32"
    assert files(out) == files(caches["tiny-cross"])  # the very cache that float32 by name makes
    machine(monkeypatch, True)
    shutil.rmtree(out / "draw=01")
    assert build_cache(auto).computed == 3
    assert files(out) == files(caches["tiny-cross"])
    engine = {"device": "cpu", "dtype": "bfloat16"}
    with pytest.raises(TideError, match="dtype"):
        build_cache(small_cache_config("tiny-cross", random_teacher, out, engine=engine))
