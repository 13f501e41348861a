"""Scores of use, on an embedded student."""

import itertools
from pathlib import Path

import pytest

from pipelines.evaluation import use_scores
from pipelines.evaluation.use_scores import USE, fill, gaps_of, is_function, read_use, score_all
from shared.models.checkpoint import resolve
from student_train.using.student import load_for_use

STUDENT = resolve("embedded:student_train/tiny_students/cross")


def test_gaps_are_whole_lines_and_filled_together_as_alone() -> None:
    student = load_for_use(STUDENT, "cpu")
    gaps = list(itertools.islice(gaps_of(student), 5))
    for gap in gaps:
        line = student.tokenizer.decode(gap.ids[gap.places].tolist())
        assert line.strip() and "\n" not in line
    for threshold in (0.3, 0.999):
        for gap, (ids, steps) in zip(gaps, fill(student, gaps, threshold), strict=True):
            assert fill(student, [gap], threshold) == [(ids, steps)]
            assert len(ids) == len(gap.places) and student.special.mask not in ids
            assert steps == len(ids) if threshold == 0.999 else steps <= len(ids)


def test_scores_are_the_same_every_time_and_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(use_scores, "_LINES", 6)
    monkeypatch.setattr(use_scores, "_FUNCTIONS", 3)
    scores = use_scores.score_use(STUDENT)
    assert use_scores.score_use(STUDENT) == scores and 1 <= scores.tokens_per_step <= 32
    assert read_use(tmp_path) is None
    text = '{"lines": 0.5, "parse": 0.5, "tokens_per_step": 2.0, "threshold": 0.9}'
    (tmp_path / USE).write_text(text)
    score_all([tmp_path])  # there already: no model is looked for
    known = read_use(tmp_path)
    assert known is not None and known.lines == 0.5
    assert is_function("async def f():\n    pass")
    assert not any(map(is_function, ["x = 1", "def f(:", "def f(): pass\nx = 1", "", "\0"]))
