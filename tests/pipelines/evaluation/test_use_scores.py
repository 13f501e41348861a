"""Scores of use, on a student that knows one line by heart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines.evaluation import use_scores
from pipelines.evaluation.use_scores import USE, _complete, _is_function, read_use, score_all
from shared.models.checkpoint import resolve
from student_train.using.load import load_for_use
from student_train.using.sampler import SampleConfig, sample_steps

STUDENT = resolve("embedded:student_train/tiny_students/cross")


@pytest.mark.parametrize(
    ("text", "good"),
    [("def f(x):\n    return x", True), ("async def f():\n    pass", True), ("x = 1", False), ("def f(:", False),
     ("def f():\n    pass\nx = 1", False), ("def f():\n    return (1 +", False), ("", False), ("\0", False)],
)  # fmt: skip
def test_what_counts_as_a_function(text: str, good: bool) -> None:
    assert _is_function(text) == good


def test_steps_of_a_row_are_those_that_it_takes_alone() -> None:
    student = load_for_use(STUDENT, "cpu")
    contexts = [student.prompt([{"role": "user", "content": text}]) for text in ("Write `f`.", "Write `Chunk.close`.")]
    tokens, steps = _complete(student, contexts, 0.5)
    block = student.block or 32
    config = SampleConfig(new_tokens=block, min_new_tokens=block, block=block, threshold=0.5)
    for context, mine, n in zip(contexts, tokens, steps, strict=True):
        alone = list(sample_steps(student.model, [context], student.special, config))
        assert alone[-1][0][0].tolist() == mine
        assert len(alone) == n
    assert 1 <= min(steps) <= max(steps) <= block


def test_scores_are_written_once_and_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(use_scores, "_LINES", 6)
    monkeypatch.setattr(use_scores, "_FUNCTIONS", 3)
    torch.set_num_threads(2)
    found = [use_scores.score_use(STUDENT) for _ in range(2)]
    assert found[0] == found[1]
    assert 0 <= found[0].lines <= 1 and 0 <= found[0].parse <= 1 and 1 <= found[0].tokens_per_step <= 32
    run = tmp_path / "a-seed0"
    run.mkdir()
    assert read_use(run) is None
    (run / USE).write_text('{"lines": 0.5, "parse": 0.5, "tokens_per_step": 2.0, "threshold": 0.9}')
    score_all([run])  # there already: no model is looked for
    known = read_use(run)
    assert known is not None and known.lines == 0.5
