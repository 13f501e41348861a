"""What may happen to a cache in a month: nothing finished is lost, nothing wrong is trained on, every case says what
to do. The number of cases is printed with `pytest -s`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit, read_shard
from shared.settings.build import to_plain
from shared.system.errors import TideError
from student_train.training.trainer import train_student
from teacher_cache.run.build import build_cache
from tests.conftest import chats_file, small_cache_config
from tests.reading import layout_of
from tests.shared.cache.test_row import assert_same
from tests.student_train.training.test_trainer import config as train_settings

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_killed_or_out_of_disk_at_every_point(random_teacher: Path, tmp_path: Path) -> None:
    settings = small_cache_config(
        "tiny-cross", random_teacher, tmp_path, noise={"draws": 2}, shard_examples=12,
        data={"source": str(chats_file()), "limit": 24},
    )  # fmt: skip
    harness = [sys.executable, "-m", "tests.teacher_cache.run.fault_harness"]
    done = subprocess.run(
        [*harness, json.dumps(to_plain(settings)), str(tmp_path)], cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads(done.stdout.splitlines()[-1])
    print(cases)
    assert cases["killed"] >= 20
    assert cases["disk full"] == cases["killed"]


def damaged_copies(whole: bytes, flips: int, cuts: int) -> list[bytes]:
    """Truncated at `cuts` places, one bit turned at `flips` places, more of them in the last third (the footer)."""
    chance = random.Random(0)
    copies = [whole[: chance.randrange(len(whole))] for _ in range(cuts)]
    third = 2 * len(whole) // 3
    places = [
        chance.randrange(len(whole)) if i % 2 else chance.randrange(third, len(whole))
        for i in range(flips)
    ]
    return copies + [
        whole[:p] + bytes([whole[p] ^ 1 << chance.randrange(8)]) + whole[p + 1 :] for p in places
    ]


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["tiny-cross", "tiny-shared"])
def test_a_damaged_shard_is_refused_or_reads_the_same(
    caches: dict[str, Path], tmp_path: Path, teacher: str
) -> None:
    source = Unit(0, 0).path(caches[teacher])
    path = tmp_path / "draw=00" / "part-00000.parquet"
    path.parent.mkdir()
    layout = layout_of(caches[teacher])
    expected = read_shard(source, layout)
    copies = damaged_copies(source.read_bytes(), flips=1500, cuts=60)
    refused = 0
    for copy in copies:
        path.write_bytes(copy)
        try:
            rows = read_shard(path, layout)
        except TideError:
            refused += 1
            continue
        assert len(rows) == len(expected)
        for a, b in zip(rows, expected, strict=True):
            assert_same(a, b, exact=True)
    print(f"{len(copies)} damaged shards, {refused} refused")
    assert refused >= 0.5 * len(copies)


def test_a_damaged_manifest_is_refused_or_reads_the_same(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    source = caches["tiny-shared"] / "manifest.json"
    expected = load_manifest(caches["tiny-shared"])
    refused = 0
    copies = damaged_copies(source.read_bytes(), flips=1000, cuts=100)
    for copy in copies:
        (tmp_path / "manifest.json").write_bytes(copy)
        try:
            assert load_manifest(tmp_path) == expected
        except TideError:
            refused += 1
    print(f"{len(copies)} damaged manifests, {refused} refused")
    assert refused > 0.8 * len(copies)


HOLD = """
import sys, time
from pathlib import Path
from shared.settings.config import CacheConfig
from teacher_cache.run.build import only_writer
with only_writer(CacheConfig(out=Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_writers_in_two_processes(random_teacher: Path, tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "c")], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        config = small_cache_config(
            "tiny-shared", random_teacher, tmp_path / "c", noise={"draws": 1}
        )
        with pytest.raises(TideError):
            build_cache(config)
    finally:
        holder.kill()
        holder.communicate()
    time.sleep(0.1)
    assert build_cache(config).computed == 3  # killed, it holds the lock no longer


def edited(path: Path, name: str, **changes: Any) -> None:
    values = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps({**values, **changes}))


def test_a_cache_of_another_version_is_neither_continued_nor_trained_on(
    caches: dict[str, Path], random_teacher: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(caches["tiny-cross"], tmp_path / "cache"))
    edited(cache, "manifest.json", schema_version=1)
    for attempt in (
        lambda: build_cache(small_cache_config("tiny-cross", random_teacher, cache)),
        lambda: train_student(train_settings(cache, tmp_path / "run")),
    ):
        with pytest.raises(TideError):
            attempt()


def test_nothing_wrong_is_trained_on(caches: dict[str, Path], tmp_path: Path) -> None:
    """A missing shard, one of another cache, one of another draw, a truncated one, a manifest that was edited."""

    def missing(cache: Path) -> None:
        Unit(1, 0).path(cache).unlink()

    def foreign(cache: Path) -> None:
        shutil.copyfile(Unit(0, 0).path(caches["tiny-shared"]), Unit(0, 0).path(cache))

    def misplaced(cache: Path) -> None:
        shutil.copyfile(Unit(1, 0).path(cache), Unit(0, 0).path(cache))

    def truncated(cache: Path) -> None:
        path = Unit(0, 1).path(cache)
        path.write_bytes(path.read_bytes()[:-1])

    def rewritten(cache: Path) -> None:
        edited(cache, "manifest.json", draws=1)

    for harm in (missing, foreign, misplaced, truncated, rewritten):
        cache = Path(shutil.copytree(caches["tiny-cross"], tmp_path / harm.__name__))
        harm(cache)
        with pytest.raises(TideError, match=str(cache)):
            train_student(train_settings(cache, tmp_path / f"run-{harm.__name__}"))
