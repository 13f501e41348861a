from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from shared.cache.shards import finished_units
from shared.system.errors import TideError
from teacher_cache.run import workers
from teacher_cache.run.build import build_cache
from teacher_cache.run.open import open_or_begin
from tests.conftest import small_cache_config

pytestmark = pytest.mark.slow  # every process imports torch and transformers anew

ENGINE = {"dtype": "float32", "device": "cpu", "tokens_per_batch": 128}


def config(teacher: Path, out: Path, workers: int) -> Any:
    return small_cache_config(
        "tiny-cross", teacher, out, shard_examples=2, engine={**ENGINE, "data_parallel": workers}
    )


def shards(config: Any) -> dict[Any, bytes]:
    return {unit: unit.path(config.out).read_bytes() for unit in finished_units(config.out)}


def test_two_processes_write_what_one_writes(random_teacher: Path, tmp_path: Path) -> None:
    one, two = (config(random_teacher, tmp_path / str(n), n) for n in (1, 2))
    build_cache(one)
    report = build_cache(two)
    assert report.computed == 24
    assert shards(one) == shards(two)


@pytest.mark.faults("kill -9 at random moments")
def test_a_killed_process_is_replaced_and_nothing_is_lost(
    random_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One of the two processes is killed when it has written a shard: the other and a new one write the rest."""
    killed: list[int] = []
    start = workers._Crew._start

    def watched(self: Any, index: int) -> Any:
        member = start(self, index)
        if index == 0 and not killed:
            threading.Thread(target=kill_later, args=(member.process.pid,)).start()
        return member

    settings = config(random_teacher, tmp_path / "two", 2)

    def kill_later(pid: int) -> None:
        while not finished_units(settings.out):
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    monkeypatch.setattr(workers._Crew, "_start", watched)
    build_cache(settings)
    assert killed
    assert "worker 0 died (exit code -9)" in capfd.readouterr().out
    alone = config(random_teacher, tmp_path / "one", 1)
    build_cache(alone)
    assert shards(alone) == shards(settings)


def test_a_process_that_always_dies_ends_the_run(
    random_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(random_teacher, tmp_path / "c", 2)
    plan = open_or_begin(settings)
    monkeypatch.setattr(
        workers, "_serve", os._exit
    )  # called with the plan: no exit code, so it dies of the error
    with pytest.raises(TideError, match=r"died 4 times[\s\S]*finished shards are kept"):
        workers.run_workers(plan, plan.missing)


def test_what_a_process_finds_wrong_reaches_the_user(random_teacher: Path, tmp_path: Path) -> None:
    settings = config(random_teacher, tmp_path / "c", 2)
    plan = open_or_begin(settings)
    (random_teacher / "model.safetensors").rename(random_teacher / "hidden")
    try:
        with pytest.raises(TideError, match="has no safetensors weights"):
            workers.run_workers(plan, plan.missing)
    finally:
        (random_teacher / "hidden").rename(random_teacher / "model.safetensors")
