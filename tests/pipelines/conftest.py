from __future__ import annotations

from pathlib import Path

import pytest

from student_train.training.trainer import train_student
from tests.student_train.training.test_trainer import config


@pytest.fixture(scope="session")
def student(caches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small student after four steps."""
    out = tmp_path_factory.mktemp("student") / "run"
    train_student(config(caches["tiny-cross"], out, max_steps=4))
    return str(out / "model")
