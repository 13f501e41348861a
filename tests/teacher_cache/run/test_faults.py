"""What may happen to a cache in a month: nothing finished is lost, nothing wrong is trained on.

As a program (settings as JSON, a folder): stage one killed, or its disk filled, wherever it touches
the disk. A point is a step of `shared.system.files`: a temporary file opened, written, synced,
renamed, its folder synced. For each point a forked child builds a cache and meets the fault there;
a second child finishes the cache, which must then be byte for byte the one that met none. Prints
the number of cases as JSON.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.cache.manifest import load_manifest
from shared.cache.row import CacheRow
from shared.cache.shards import Unit
from shared.settings.build import build, to_plain
from shared.settings.config import CacheConfig
from shared.system import files as system_files
from shared.system.files import TideError
from student_train.training.trainer import train_student
from teacher_cache.run.build import build_cache
from tests.conftest import files, small_cache_config
from tests.reading import layout_of, read_shard
from tests.shared.cache.test_row import assert_same
from tests.student_train.training.test_trainer import config as train_settings

ROOT = Path(__file__).parents[3]
Fault = Callable[[], None]


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def put_points(at: int, fault: Fault) -> list[str]:
    """A point before each step of writing a file, and one in the middle; `fault` at number `at`.

    Returns a list that has the name of every file with a point: `at` of them where it was met.
    """
    seen: list[str] = []
    real_fsync, real_sync = os.fsync, system_files.sync_folder
    real_replace, real_open = Path.replace, Path.open

    def point(path: Any = None) -> None:
        seen.append(getattr(path, "name", "elsewhere"))
        if len(seen) == at:
            fault()

    def before(step: Callable[..., Any], known: bool) -> Callable[..., Any]:
        def with_point(target: Any, *more: Any) -> Any:
            point(target if known else None)
            return step(target, *more)

        return with_point

    def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not (path.name.endswith(".tide-tmp") and mode == "wb"):
            return real_open(path, mode, *args, **kwargs)
        point(path)
        handle: Any = real_open(path, mode, *args, **kwargs)
        handle.write(b"half of it")  # what a fault in the middle leaves behind
        point(path)
        handle.seek(0)
        handle.truncate()
        return handle

    system_files.os.fsync = before(real_fsync, known=False)
    system_files.sync_folder = before(real_sync, known=False)
    Path.replace = before(real_replace, known=True)  # type: ignore[method-assign]
    Path.open = opened  # type: ignore[method-assign]
    return seen


def build_in_child(config: dict[str, Any], at: int, fault: Fault, expected: str = "") -> int:
    """Exit code of a forked build that meets a fault; negative where a signal ended it.

    0: it came to its end without it, 3: it stopped with the expected message, 5: the fault was in
    writing how far it is, for which no build stops.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 99
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - progress bars of a hundred builds
    try:
        seen = put_points(at, fault)
        build_cache(build(CacheConfig, config))
        met_in = seen[at - 1] if 0 < at <= len(seen) else ""
        code = 0 if not met_in else 5 if met_in.startswith(".status") else 6
    except TideError as error:
        code = 3 if expected in str(error) else 4
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
    finally:
        os._exit(code)


def meet_all(config: dict[str, Any], folder: Path, fault: Fault, ends: int, expected: str) -> int:
    """All points of one fault; how many there were."""
    whole = folder / "whole"
    assert build_in_child({**config, "out": str(whole)}, 0, fault) == 0
    at = 0
    while True:
        at += 1
        out = folder / f"at-{at}"
        settings = {**config, "out": str(out)}
        code = build_in_child(settings, at, fault, expected)
        if code == 0:
            assert files(out) == files(whole)
            return at - 1
        assert code == ends or (code == 5 and fault is fill_disk), f"point {at}: exit code {code}"
        assert build_in_child(settings, 0, fault) == 0, f"point {at}: the next run did not finish"
        assert files(out) == files(whole), f"point {at}: another cache"
        assert not list(out.rglob(".*.tide-tmp")), f"point {at}: leftovers"
        shutil.rmtree(out)


@pytest.mark.slow
def test_killed_or_out_of_disk_at_every_point(random_teacher: Path, tmp_path: Path) -> None:
    settings = small_cache_config("tiny-cross", random_teacher, tmp_path, shard_examples=12)
    command = [sys.executable, "-m", __name__, json.dumps(to_plain(settings)), str(tmp_path)]
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=one, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads(done.stdout.splitlines()[-1])
    assert cases["disk full"] == cases["killed"] >= 20


def test_damage_is_refused_or_reads_the_same(caches: dict[str, Path], tmp_path: Path) -> None:
    """Truncated anywhere, or one bit turned, every second time in the last third (the footer)."""
    cache, chance = tmp_path / "c", random.Random(0)
    shutil.copytree(caches["tiny-shared"], cache)
    layout, shard = layout_of(cache), Unit(0, 0).path(cache)
    for path, read, flips, least in (
        (shard, lambda: read_shard(shard, layout), 300, 0.5),
        (cache / "manifest.json", lambda: [load_manifest(cache)], 1000, 0.8),
    ):
        whole, expected, refused = path.read_bytes(), read(), 0
        for i in range(11 * flips // 10):
            first = 2 * len(whole) // 3 if i % 2 else 0
            damaged = bytearray(whole)
            if i >= flips:
                del damaged[chance.randrange(len(whole)) :]
            else:
                damaged[chance.randrange(first, len(whole))] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            try:
                found = read()
            except TideError:
                refused += 1
                continue
            for a, b in zip(found, expected, strict=True):
                if isinstance(a, CacheRow) and isinstance(b, CacheRow):
                    assert_same(a, b, exact=True)
                else:
                    assert a == b
        assert refused > least * flips * 1.1


def test_nothing_wrong_is_trained_on(caches: dict[str, Path], tmp_path: Path) -> None:
    whole = caches["tiny-cross"]
    harms = {  # what stands in place of the first shard
        "missing": None,
        "another": Unit(0, 0).path(caches["tiny-shared"]),
        "of another draw": Unit(1, 0).path(whole),
    }
    for name, other in harms.items():
        cache = Path(shutil.copytree(whole, tmp_path / name))
        Unit(0, 0).path(cache).unlink()
        if other:
            shutil.copyfile(other, Unit(0, 0).path(cache))
        with pytest.raises(TideError, match=str(cache)):
            train_student(train_settings(cache, tmp_path / f"run of {name}"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    kill = partial(signal.raise_signal, signal.SIGKILL)
    cases = {
        "killed": meet_all(settings, folder / "kill", kill, -signal.SIGKILL, ""),
        "disk full": meet_all(settings, folder / "full", fill_disk, 3, "the disk is full"),
    }
    print(json.dumps(cases))
