"""Folders of runs of strangers: what they recorded is read, and never run."""

from __future__ import annotations

import json
import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluation.answers import Answers
from shared.system.errors import TideError
from tests.faults.test_foreign_folders import explained


class Runs:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder),)


@pytest.mark.faults("run folders of strangers")
@pytest.mark.parametrize("name", [".humaneval-abc_rank0.db", ".humaneval-abc_rank0.jsonl"])
def test_answers_that_would_run_code_are_not_read(name: str, tmp_path: Path) -> None:
    import sqlite3

    with sqlite3.connect(tmp_path / name) as database:
        database.execute("CREATE TABLE unnamed (key TEXT PRIMARY KEY, value BLOB)")
        database.execute(
            "INSERT INTO unnamed VALUES ('x', ?)", (pickle.dumps(Runs(tmp_path / "ran")),)
        )
    database.close()
    assert Answers(tmp_path / name).get("generate_until", "x") is None
    assert not (tmp_path / "ran").exists()


@pytest.mark.faults("run folders of strangers")
def test_answers_are_found_again_and_changed_ones_are_not(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first = Answers(path)
    first.add("generate_until", ("q", {"until": ["\n"]}, 0), "a\u2028b")
    first.add("loglikelihood", (("c", "d"),), (-1.5, True))
    again = Answers(path)
    assert again.get("generate_until", "q", {"until": ["\n"]}, 0) == "a\u2028b"
    assert again.get("generate_until", "q", {"until": ["\n"]}, 1) is None
    assert again.get("loglikelihood", ("c", "d")) == [-1.5, True]
    path.write_text(path.read_text().replace("-1.5", "-0.5")[:-9])  # changed, and cut
    last = Answers(path)
    last.add("loglikelihood_rolling", ("t",), -3.0)
    found = Answers(path)
    assert found.get("loglikelihood", ("c", "d")) is None
    assert found.get("loglikelihood_rolling", "t") == -3.0
    assert found.get("generate_until", "q", {"until": ["\n"]}, 0) is not None


GARBAGE = [b"", b"{", b"[]", b"3", b"null", b'{"config": 3}', b'{"config": {}}', b'{"steps": 3, "final": {}}',
           b"\xff\xfe",
           b'{"config": {"seed": "x"}}', b'{"steps": [3], "final": {"x": "y"}}', b"[" * 100_000]  # fmt: skip


@pytest.mark.faults("run folders of strangers")
@pytest.mark.parametrize("content", GARBAGE, ids=[str(content[:40]) for content in GARBAGE])
@pytest.mark.parametrize("name", ["run.json", "history.json", "use.json"])
def test_reports_of_odd_runs(name: str, content: bytes, tmp_path: Path) -> None:
    from pipelines.reports.report import find_runs
    from shared.settings.build import to_plain
    from shared.settings.config import TrainConfig

    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"config": to_plain(TrainConfig())}))
    (run / "history.json").write_text(json.dumps({"steps": [], "final": {}}))
    find_runs(tmp_path)
    (run / name).write_bytes(content)
    if (name, content) != ("run.json", b'{"config": {}}'):  # an empty one has all defaults
        with explained():
            find_runs(tmp_path)


@pytest.mark.faults("run folders of strangers")
@pytest.mark.parametrize("content", GARBAGE, ids=[str(content[:40]) for content in GARBAGE])
@pytest.mark.parametrize("name", ["run.json", "nonfinite.json"])
def test_replays_of_odd_runs(name: str, content: bytes, tmp_path: Path) -> None:
    from shared.settings.build import to_plain
    from shared.settings.config import TrainConfig
    from student_train.training.replay import replay

    (tmp_path / "run.json").write_text(
        json.dumps({"config": {**to_plain(TrainConfig()), "cache": "none"}})
    )
    (tmp_path / "nonfinite.json").write_text(json.dumps({"step": 1, "batch": 1, "example_ids": []}))
    (tmp_path / name).write_bytes(content)
    with explained():
        replay(tmp_path)


@pytest.mark.faults("run folders of strangers")
@pytest.mark.parametrize("content", GARBAGE, ids=[str(content[:40]) for content in GARBAGE])
def test_results_of_odd_evaluations(content: bytes, tmp_path: Path) -> None:
    from pipelines.evaluation.results import read_scores

    (tmp_path / "gsm8k.json").write_bytes(content)
    with suppress(TideError):
        assert read_scores(tmp_path) == []
