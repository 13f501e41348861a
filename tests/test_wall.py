"""Teacher and student never share a GPU: in the code's form, the stages never import each other."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("shared", "teacher_cache", "student_train", "pipelines", "tide")


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the code and its contract, to break."""
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            target = tmp_path / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(house: Path) -> subprocess.CompletedProcess[str]:
    command = (
        "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"
    )
    return subprocess.run(
        [sys.executable, "-c", command], cwd=house, capture_output=True, text=True, check=False
    )


def test_the_contract_holds(house: Path) -> None:
    done = lint(house)
    assert done.returncode == 0, done.stdout
    assert "1 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "chain"),
    [
        (
            "student_train/training/trainer.py",
            "from teacher_cache.run.build import build_cache",
            "teacher_cache",
        ),
        (
            "teacher_cache/run/build.py",
            "from student_train.training.trainer import train_student",
            "student_train",
        ),
        (
            "shared/diffusion/noise.py",
            "from teacher_cache.method.targets import TargetSpec",
            "teacher_cache",
        ),
        (
            "shared/models/loading.py",
            "from pipelines.recipes.read import cache_config",
            "pipelines",
        ),
    ],
)
def test_it_breaks_where_a_stage_looks_over_the_wall(
    house: Path, file: str, line: str, chain: str
) -> None:
    with (house / file).open("a") as handle:
        handle.write(
            f"\n\ndef _peep() -> None:\n    {line}\n"
        )  # hidden in a function, where no import would fail
    done = lint(house)
    assert done.returncode == 1, done.stdout
    module = file.removesuffix(".py").replace("/", ".")
    assert f"{module} -> {chain}" in done.stdout


def test_every_package_is_in_the_wheel() -> None:
    """Packages are listed one by one, so that tests stay out; one that is forgotten is missing once installed."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for room in ROOMS
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert set(listed) == found
