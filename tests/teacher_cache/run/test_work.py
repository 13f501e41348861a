"""The pipeline of units, and what it says of itself."""

import threading
from pathlib import Path
from typing import Any

import pytest

from shared.cache.shards import Unit, finished_units
from shared.system.errors import TideError
from teacher_cache.run import build, work
from teacher_cache.run.build import build_cache
from teacher_cache.run.open import Run, open_or_begin
from teacher_cache.run.progress import read_status
from teacher_cache.run.work import load_engine, run_units
from tests.conftest import small_cache_config


@pytest.fixture
def run(random_teacher: Path, tmp_path: Path) -> Run:
    changes = {"targets": {"signals": ["chunks"]}}
    out = tmp_path / "cache"
    return open_or_begin(small_cache_config("tiny-cross", random_teacher, out, **changes))


def spied(run: Run, before: Any) -> Any:
    """The run's engine, which calls `before` with the number of the call."""
    engine: Any = load_engine(run)
    score, calls = engine.score, [0]

    def counted(requests: Any) -> Any:
        calls[0] += 1
        before(calls[0])
        return score(requests)

    engine.score = counted
    return engine


def test_the_next_unit_is_prepared_and_the_last_one_written_while_the_engine_works(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scoring waits for the next unit's preparation, writing for the next scoring: no deadlock."""
    every = run.missing
    prepared, calls, scoring = [0], [0], threading.Condition()
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

    report = build_cache(config(1))
    first = read_status(out)
    assert first["state"] == "finished"
    assert first["rows_done"] == first["rows_to_do"] == report.rows
    assert first["bytes_written"] == report.bytes
    assert 0 < first["engine_busy_share"] <= 1
    assert f'tide_cache_rows_done{{teacher="tiny-shared"}} {report.rows}\n' in metrics.read_text()
    build_cache(config(2))
    second = read_status(out)
    assert second["rows_done"] == report.rows
    assert second["engine_seconds"] >= first["engine_seconds"]

    def fails(_call: int) -> None:
        raise TideError("no more")

    monkeypatch.setattr(build, "load_engine", lambda run: spied(run, fails))
    with pytest.raises(TideError):
        build_cache(config(3))
    assert read_status(out)["state"] == "failed"
    for text in ("{", "[1]"):
        (out / "status.json").write_text(text)
        assert read_status(out) == {}
