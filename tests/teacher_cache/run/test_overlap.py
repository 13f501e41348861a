from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from shared.cache.shards import Unit, finished_units
from shared.system.errors import TideError
from teacher_cache.run import overlap
from teacher_cache.run.load_engine import load_engine
from teacher_cache.run.open import Run, open_or_begin
from teacher_cache.run.units import run_units
from tests.conftest import small_cache_config


@pytest.fixture
def plan(random_teacher: Path, tmp_path: Path) -> Run:
    targets = {"signals": ["chunks"]}
    return open_or_begin(
        small_cache_config("tiny-cross", random_teacher, tmp_path / "cache", targets=targets)
    )


class Spy:
    """An engine that calls `before` with the number of the call."""

    def __init__(self, engine: Any, before: Any) -> None:
        self._engine, self._before, self.calls = engine, before, 0

    def score(self, requests: Any) -> Any:
        self.calls += 1
        self._before(self.calls)
        return self._engine.score(requests)

    def outside(self, requests: Any) -> Any:
        return self._engine.outside(requests)

    def use_classes(self, class_of: Any) -> None:
        self._engine.use_classes(class_of)

    def close(self) -> None:
        self._engine.close()


def test_the_next_unit_is_prepared_and_the_last_one_written_while_the_engine_works(
    plan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each scoring call waits for the next unit's preparation, each write for the next scoring call: no deadlock."""
    units = plan.missing
    prepared, scoring = [0], threading.Condition()
    calls = [0]
    prepare, write = overlap.prepare_unit, overlap.write_shard

    def note_prepared(*args: Any) -> Any:
        work = prepare(*args)
        with scoring:
            prepared[0] += 1
            scoring.notify_all()
        return work

    def late_write(path: Path, rows: Any, *rest: Any) -> bytes:
        number = units.index(Unit(int(path.parent.name[-2:]), int(path.stem[-5:]))) + 1
        with scoring:
            assert scoring.wait_for(lambda: calls[0] > number or number == len(units), timeout=30)
        return write(path, rows, *rest)

    def before(call: int) -> None:
        with scoring:
            calls[0] = call
            scoring.notify_all()
            assert scoring.wait_for(lambda: prepared[0] >= min(call + 1, len(units)), timeout=30)

    monkeypatch.setattr(overlap, "prepare_unit", note_prepared)
    monkeypatch.setattr(overlap, "write_shard", late_write)
    run_units(plan, Spy(load_engine(plan), before), units)
    assert finished_units(plan.config.out) == units


def test_what_was_scored_is_written_when_a_later_unit_stops_the_run(plan: Run) -> None:
    def before(call: int) -> None:
        if call == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_units(plan, Spy(load_engine(plan), before), plan.missing)
    assert finished_units(plan.config.out) == plan.manifest.units()[:3]


def test_an_error_in_preparation_reaches_the_user(
    plan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_plan: Run, unit: Unit, _examples: Any) -> Any:
        raise TideError(f"unit {unit.part} cannot be prepared")

    monkeypatch.setattr(overlap, "prepare_unit", fails)
    with pytest.raises(TideError, match="unit 0 cannot be prepared"):
        run_units(plan, load_engine(plan), plan.missing)
