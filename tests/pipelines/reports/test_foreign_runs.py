"""Folders of runs of strangers: what they recorded is read, and never run."""

import json
import os
import pickle
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluation.benchmarks import Answers, read_scores
from pipelines.experiments.report import find_runs
from shared.settings.build import to_plain
from shared.settings.config import TrainConfig
from shared.system.errors import TideError
from student_train.training.replay import replay

GARBAGE = [
    b"",
    b"{",
    b"[]",
    b"3",
    b'{"config": 3}',
    b'{"steps": [3], "final": {"x": "y"}}',
    b"\xff",
    b'{"config": {"seed": "x"}}',
    b"[" * 100_000,
]


class Runs:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_answers_that_would_run_code_are_not_read(tmp_path: Path) -> None:
    path, code = tmp_path / ".humaneval-abc_rank0.jsonl", pickle.dumps(Runs(tmp_path / "ran"))
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE unnamed (key TEXT PRIMARY KEY, value BLOB)")
        database.execute("INSERT INTO unnamed VALUES ('x', ?)", (code,))
    database.close()
    assert Answers(path).get("generate_until", ("x",)) is None
    assert not (tmp_path / "ran").exists()


def test_answers_are_found_again_and_changed_ones_are_not(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first = Answers(path)
    first.add("generate_until", ("q", {"until": ["\n"]}, 0), "a\u2028b")
    first.add("loglikelihood", (("c", "d"),), (-1.5, True))
    again = Answers(path)
    assert again.get("generate_until", ("q", {"until": ["\n"]}, 0)) == "a\u2028b"
    assert again.get("generate_until", ("q", {"until": ["\n"]}, 1)) is None
    assert again.get("loglikelihood", (("c", "d"),)) == [-1.5, True]
    path.write_text(path.read_text().replace("-1.5", "-0.5")[:-9])  # changed, and cut
    last = Answers(path)
    last.add("loglikelihood_rolling", ("t",), -3.0)
    found = Answers(path)
    assert found.get("loglikelihood", (("c", "d"),)) is None
    assert found.get("loglikelihood_rolling", ("t",)) == -3.0
    assert found.get("generate_until", ("q", {"until": ["\n"]}, 0)) is not None


@pytest.mark.parametrize("name", ["run.json", "history.json", "use.json", "nonfinite.json"])
def test_odd_runs_are_explained(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    whole = {
        "run.json": {"config": {**to_plain(TrainConfig()), "cache": "none"}},
        "history.json": {"steps": [], "final": {}},
        "nonfinite.json": {"step": 1, "batch": 1, "example_ids": []},
    }
    for file, values in whole.items():
        (run / file).write_text(json.dumps(values))
    for content in GARBAGE:
        (run / name).write_bytes(content)
        with pytest.raises(TideError):  # noqa: PT012
            replay(run) if name == "nonfinite.json" else find_runs(tmp_path)
            pytest.fail(f"{content[:40]!r} was taken")


def test_results_of_odd_evaluations(tmp_path: Path) -> None:
    for content in GARBAGE:
        (tmp_path / "gsm8k.json").write_bytes(content)
        with suppress(TideError):
            assert read_scores(tmp_path) == []
