"""Scores of use, on an embedded student."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from pipelines.evaluation import use_scores
from pipelines.evaluation.use_scores import USE, _fill, _gaps, _is_function, read_use, score_all
from shared.models.checkpoint import resolve
from student_train.using.load import load_for_use

STUDENT = resolve("embedded:student_train/tiny_students/cross")


@pytest.mark.parametrize(
    ("text", "good"),
    [("def f(x):\n    return x", True), ("async def f():\n    pass", True), ("x = 1", False), ("def f(:", False),
     ("def f():\n    pass\nx = 1", False), ("def f():\n    return (1 +", False), ("", False), ("\0", False)],
)  # fmt: skip
def test_what_counts_as_a_function(text: str, good: bool) -> None:
    assert _is_function(text) == good


def test_a_gap_is_a_whole_line_of_the_answer() -> None:
    student = load_for_use(STUDENT, "cpu")
    gaps = list(itertools.islice(_gaps(student), 20))
    assert len(gaps) == 20
    for gap in gaps:
        line = student.tokenizer.decode(gap.ids[gap.places].tolist())
        assert line.strip() and "\n" not in line
        assert line in student.tokenizer.decode(gap.ids.tolist())


@pytest.mark.parametrize("threshold", [0.3, 0.999])
def test_gaps_are_filled_together_as_alone(threshold: float) -> None:
    student = load_for_use(STUDENT, "cpu")
    gaps = list(itertools.islice(_gaps(student), 5))
    together = _fill(student, gaps, threshold)
    for gap, (ids, steps) in zip(gaps, together, strict=True):
        assert _fill(student, [gap], threshold) == [(ids, steps)]
        assert len(ids) == len(gap.places) and student.special.mask not in ids
        assert steps == len(ids) if threshold == 0.999 else steps <= len(ids)


def test_scores_are_written_once_and_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(use_scores, "_LINES", 6)
    monkeypatch.setattr(use_scores, "_FUNCTIONS", 3)
    torch.set_num_threads(2)
    found = [use_scores.score_use(STUDENT) for _ in range(2)]
    assert found[0] == found[1]
    assert (
        0 <= found[0].lines <= 1
        and 0 <= found[0].parse <= 1
        and 1 <= found[0].tokens_per_step <= 32
    )
    run = tmp_path / "a-seed0"
    run.mkdir()
    assert read_use(run) is None
    (run / USE).write_text('{"lines": 0.5, "parse": 0.5, "tokens_per_step": 2.0, "threshold": 0.9}')
    score_all([run])  # there already: no model is looked for
    known = read_use(run)
    assert known is not None and known.lines == 0.5
