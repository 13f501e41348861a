"""Ranks: of one disk, of one store, as processes, on a Ray cluster; all make the one cache."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from shared.cache.shards import Unit, finished_units
from shared.cache.stores import Store
from shared.settings.build import build
from shared.settings.config import CacheConfig
from shared.system import processes
from shared.system.files import TideError
from teacher_cache.run import work
from teacher_cache.run.build import build_cache, only_writer
from teacher_cache.run.open import Run, open_or_begin
from teacher_cache.run.progress import read_status
from teacher_cache.run.work import load_engine, run_units
from tests.conftest import files, small_cache_config

CPU = {"dtype": "float32", "device": "cpu"}


def test_on_one_disk(caches: dict[str, Path], random_teacher: Path, tmp_path: Path) -> None:
    """Ranks share the units."""
    out = tmp_path / "c"
    for rank in range(3):
        own = {"rank": rank, "world": 3}
        report = build_cache(small_cache_config("tiny-shared", random_teacher, out, **own))
        assert (report.computed, report.kept) == (2, 2 * rank)
    assert files(out) == files(caches["tiny-shared"])
    status = read_status(out)
    assert (status["state"], status["ranks"], status["rows_done"]) == ("finished", 3, 48)
    with pytest.raises(TideError):
        build(CacheConfig, {"rank": 2, "world": 2})


def test_ranks_lock_out_plain_runs_and_twins(random_teacher: Path, tmp_path: Path) -> None:
    def config(**changes: Any) -> CacheConfig:
        return small_cache_config("tiny-shared", random_teacher, tmp_path / "c", **changes)

    with only_writer(config(rank=0, world=2)):
        for other in ({"rank": 0, "world": 2}, {}):
            with pytest.raises(TideError, match=str(os.getpid())):
                build_cache(config(**other))
        assert build_cache(config(rank=1, world=2)).computed == 3
    with only_writer(config()), pytest.raises(TideError):
        build_cache(config())


def test_over_a_store(caches: dict[str, Path], random_teacher: Path, tmp_path: Path) -> None:
    """Ranks without a common disk wait for the tables of rank 0."""
    store, reports = str(tmp_path / "store"), []

    def run(rank: int) -> None:
        changes, out = {"rank": rank, "world": 2, "store": store}, tmp_path / f"host-{rank}"
        reports.append(
            build_cache(small_cache_config("tiny-shared", random_teacher, out, **changes))
        )

    late = threading.Thread(target=run, args=(1,))
    late.start()
    time.sleep(1.5)
    assert not reports and finished_units(tmp_path / "host-1") == []
    run(0)
    late.join(timeout=120)
    assert [report.computed for report in reports] == [3, 3]
    Store.open(store).pull(tmp_path / "whole")
    assert files(tmp_path / "whole") == files(caches["tiny-shared"])


def in_child(settings: dict[str, Any], barrier: Any, results: Any) -> None:
    config = small_cache_config(**settings)
    barrier.wait()
    try:
        results.put(build_cache(config).computed)
    except BaseException as error:
        results.put(repr(error))


@pytest.mark.slow
def test_six_at_once(caches: dict[str, Path], random_teacher: Path, tmp_path: Path) -> None:
    """Released at one moment, as a Slurm array begins: no rank dies of another's files."""
    context = multiprocessing.get_context("fork")
    for trial in range(10):
        out = tmp_path / f"c{trial}"
        settings = {"teacher": "tiny-shared", "model": random_teacher, "out": out, "world": 6}
        barrier, results, children = context.Barrier(6), context.Queue(), []
        for rank in range(6):
            own = ({**settings, "rank": rank}, barrier, results)
            children.append(context.Process(target=in_child, args=own))
            children[-1].start()
        assert [results.get(timeout=300) for _ in children] == [1] * 6
        for child in children:
            child.join()
        assert files(out) == files(caches["tiny-shared"])


def test_data_parallel_makes_the_same_cache_and_goes_on_where_a_rank_was_killed(
    caches: dict[str, Path], random_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process writes its half, the run ends with an error, the same command goes on."""
    start, killed = processes.start_child, []

    def watched(*arguments: Any) -> Any:
        child = start(*arguments)
        if not killed:
            killed.append(child.pid)
            os.kill(child.pid, signal.SIGKILL)
        return child

    out, metrics = tmp_path / "c", tmp_path / "tide.prom"
    changes = {"engine": {**CPU, "data_parallel": 2}, "metrics_file": metrics}
    config = small_cache_config("tiny-shared", random_teacher, out, **changes)
    monkeypatch.setattr(processes, "start_child", watched)
    with pytest.raises(TideError, match="rank 0 of 2"):
        build_cache(config)
    assert len(finished_units(out)) == 3
    report = build_cache(config)
    assert (report.computed, report.kept) == (3, 3)
    assert files(out) == files(caches["tiny-shared"])
    assert "tide_cache_rows_done" in metrics.read_text()


def test_what_a_rank_finds_wrong_reaches_the_user(
    random_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, start = Path(shutil.copytree(random_teacher, tmp_path / "m")), processes.start_child

    def without_weights(*arguments: Any) -> Any:
        (model / "model.safetensors").unlink(missing_ok=True)
        return start(*arguments)

    monkeypatch.setattr(processes, "start_child", without_weights)
    engine = {**CPU, "data_parallel": 2}
    with pytest.raises(TideError, match=str(model)):
        build_cache(small_cache_config("tiny-cross", model, tmp_path / "c", engine=engine))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_loses_a_node(caches: dict[str, Path], random_teacher: Path, tmp_path: Path) -> None:
    """Ranks run on both nodes; one node goes while units are computed; Ray runs its ranks again."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    ray.init(address=cluster.address, log_to_driver=False)
    second = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    out = tmp_path / "c"
    engine = {**CPU, "workers": "ray", "data_parallel": 4}
    config = small_cache_config("tiny-shared", random_teacher, out, engine=engine)

    def lose() -> None:
        while not finished_units(out):
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    try:
        assert build_cache(config).computed == 6
        thread.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert files(out) == files(caches["tiny-shared"])


@pytest.fixture
def run(random_teacher: Path, tmp_path: Path) -> Run:
    out, targets = tmp_path / "cache", {"signals": ["chunks"]}
    return open_or_begin(small_cache_config("tiny-cross", random_teacher, out, targets=targets))


def spied(run: Run, before: Any) -> Any:
    """The run's engine, which calls `before` with the number of the call."""
    engine: Any = load_engine(run)
    score, numbers = engine.score, count(1)

    def counted(requests: Any) -> Any:
        before(next(numbers))
        return score(requests)

    engine.score = counted
    return engine


def test_work_beside_the_engine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring waits for the next unit's preparation, writing for the next scoring: no deadlock."""
    every, prepared, calls, scoring = run.missing, [0], [0], threading.Condition()
    prepare, write = work.prepare_unit, work.write_shard

    def note_prepared(*args: Any) -> Any:
        drawn = prepare(*args)
        with scoring:
            prepared[0] += 1
            scoring.notify_all()
        return drawn

    def late_write(path: Path, *rest: Any) -> bytes:
        number = every.index(Unit(int(path.parent.name[-2:]), int(path.stem[-5:]))) + 1
        with scoring:
            assert scoring.wait_for(lambda: calls[0] > number or number == len(every), timeout=30)
        return write(path, *rest)

    def before(call: int) -> None:
        with scoring:
            calls[0] = call
            scoring.notify_all()
            assert scoring.wait_for(lambda: prepared[0] >= min(call + 1, len(every)), timeout=30)

    monkeypatch.setattr(work, "prepare_unit", note_prepared)
    monkeypatch.setattr(work, "write_shard", late_write)
    run_units(run, spied(run, before), every)
    assert finished_units(run.config.out) == every


def test_what_was_scored_is_written_when_a_later_unit_stops_the_run(run: Run) -> None:
    def before(call: int) -> None:
        if call == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_units(run, spied(run, before), run.missing)
    assert finished_units(run.config.out) == run.manifest.units()[:3]
    assert read_status(run.config.out)["state"] == "stopped"


def test_the_status_file_tells_of_a_run_and_adds_up_what_the_cache_cost(
    random_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, metrics = tmp_path / "cache", tmp_path / "tide.prom"

    def config(draws: int) -> Any:
        changes = {"noise": {"draws": draws}, "metrics_file": metrics}
        return small_cache_config("tiny-shared", random_teacher, out, **changes)

    report, first = build_cache(config(1)), read_status(out)
    assert (first["state"], first["bytes_written"]) == ("finished", report.bytes)
    assert first["rows_done"] == first["rows_to_do"] == report.rows
    assert 0 < first["engine_busy_share"] <= 1
    assert f'tide_cache_rows_done{{teacher="tiny-shared"}} {report.rows}\n' in metrics.read_text()
    build_cache(config(2))
    second = read_status(out)
    assert second["rows_done"] == report.rows
    assert second["engine_seconds"] >= first["engine_seconds"]

    def fails(_call: int) -> None:
        raise TideError("no more")

    monkeypatch.setattr("teacher_cache.run.build.load_engine", lambda run: spied(run, fails))
    with pytest.raises(TideError):
        build_cache(config(3))
    assert read_status(out)["state"] == "failed"
    for text in ("{", "[1]"):
        (out / "status.json").write_text(text)
        assert read_status(out) == {}
