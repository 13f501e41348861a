"""What may happen to a cache in a month: nothing finished is lost, nothing wrong is trained on."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit, read_shard
from shared.settings.build import to_plain
from shared.system.errors import TideError
from student_train.training.trainer import train_student
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
    """Truncated at `cuts` places, one bit turned at `flips`, more of them in the footer's third."""
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
def test_a_damaged_shard_is_refused_or_reads_the_same(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    source = Unit(0, 0).path(caches["tiny-shared"])
    path = tmp_path / "draw=00" / "part-00000.parquet"
    path.parent.mkdir()
    layout = layout_of(caches["tiny-shared"])
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


def test_nothing_wrong_is_trained_on(caches: dict[str, Path], tmp_path: Path) -> None:
    shards = [Unit(0, 0), Unit(1, 0), Unit(0, 1)]
    foreign = shards[0].path(caches["tiny-shared"]).read_bytes()

    def missing(first: Path, second: Path, third: Path) -> None:
        second.unlink()

    def of_another_cache(first: Path, second: Path, third: Path) -> None:
        first.write_bytes(foreign)

    def of_another_draw(first: Path, second: Path, third: Path) -> None:
        first.write_bytes(second.read_bytes())

    def truncated(first: Path, second: Path, third: Path) -> None:
        third.write_bytes(third.read_bytes()[:-1])

    for harm in (missing, of_another_cache, of_another_draw, truncated):
        cache = Path(shutil.copytree(caches["tiny-cross"], tmp_path / harm.__name__))
        harm(*(unit.path(cache) for unit in shards))
        with pytest.raises(TideError, match=str(cache)):
            train_student(train_settings(cache, tmp_path / f"run-{harm.__name__}"))
