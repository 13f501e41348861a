from __future__ import annotations

import dataclasses

import pytest
from rich.console import Console

from pipelines.speed import serving
from shared.settings.config import StudentConfig
from shared.system.errors import TideError

SMALL = StudentConfig(hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=64)


def test_requests_one_by_one_and_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_SHAPE", SMALL)
    monkeypatch.setattr(serving, "_REQUESTS", 3)
    monkeypatch.setattr(serving, "_AT_ONCE", (1, 3))
    table = serving.bench_serving()
    console = Console(record=True, width=120)
    console.print(table)
    lines = [line for line in console.export_text().splitlines() if line.startswith("│")]
    assert [line.split()[1] for line in lines] == ["1", "3"]
    assert lines[0].split()[5] == "1.00"


def test_a_response_of_another_length_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_SHAPE", SMALL)
    monkeypatch.setattr(
        serving,
        "_SAMPLING",
        dataclasses.replace(serving._SAMPLING, new_tokens=32, min_new_tokens=32),
    )
    with pytest.raises(RuntimeError, match="has 32 tokens and not 64"):
        serving.bench_serving()


def test_without_the_server_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(TideError, match="must be installed to serve"):
        serving.bench_serving()
