from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shared.system.errors import TideError
from teacher_cache.run import build
from teacher_cache.run.build import build_cache
from teacher_cache.run.load_engine import load_engine
from teacher_cache.run.progress import prometheus, read_status
from tests.conftest import small_cache_config


def test_the_status_file_tells_of_a_run_and_adds_up_what_the_cache_cost(
    random_teacher: Path, tmp_path: Path
) -> None:
    out, metrics = tmp_path / "cache", tmp_path / "tide.prom"
    report = build_cache(
        small_cache_config(
            "tiny-shared", random_teacher, out, noise={"draws": 1}, metrics_file=metrics
        )
    )
    first = read_status(out)
    assert first["state"] == "finished"
    assert first["rows_done"] == first["rows_to_do"] == report.rows
    assert first["bytes_written"] == report.bytes
    assert first["failures"] == 0
    assert first["seconds_left"] == 0
    assert 0 < first["engine_busy_share"] <= 1
    assert f'tide_cache_rows_done{{teacher="tiny-shared"}} {report.rows}\n' in metrics.read_text()
    build_cache(small_cache_config("tiny-shared", random_teacher, out, noise={"draws": 2}))
    second = read_status(out)
    assert second["rows_done"] == report.rows
    assert second["engine_seconds"] >= first["engine_seconds"]


def test_a_run_that_fails_says_so(
    random_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(plan: Any) -> Any:
        engine: Any = load_engine(plan)
        engine.score = lambda _requests: (_ for _ in ()).throw(TideError("no more"))
        return engine

    monkeypatch.setattr(build, "load_engine", broken)
    with pytest.raises(TideError, match="no more"):
        build_cache(
            small_cache_config(
                "tiny-cross", random_teacher, tmp_path / "cache", targets={"signals": ["chunks"]}
            )
        )
    assert read_status(tmp_path / "cache")["state"] == "failed"


def test_prometheus_text_has_a_type_and_a_value_for_every_number() -> None:
    lines = prometheus(
        {"state": "running", "rows_done": 3, "seconds_left": None}, "llada-8b"
    ).splitlines()
    assert lines == [
        "# TYPE tide_cache_rows_done gauge",
        'tide_cache_rows_done{teacher="llada-8b"} 3',
        "# TYPE tide_cache_running gauge",
        'tide_cache_running{teacher="llada-8b"} 1',
    ]


def test_a_status_that_was_damaged_is_no_status(tmp_path: Path) -> None:
    for text in ("", "{", "[1]", json.dumps(3)):
        (tmp_path / "status.json").write_text(text)
        assert read_status(tmp_path) == {}
