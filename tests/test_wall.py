import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("shared", "teacher_cache", "student_train", "pipelines", "tide")


def test_every_package_is_in_the_wheel() -> None:
    """Packages are listed one by one; one that is forgotten is missing once installed."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for room in ROOMS
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert set(listed) == packages
