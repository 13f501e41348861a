from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from pipelines.speed import use
from pipelines.speed.full_attention import sample_full_attention
from pipelines.speed.memory import in_process
from shared.diffusion.attention import full
from shared.system.errors import TideError
from student_train.using.load import load_for_use
from student_train.using.settings import Special
from tests.student_train.model.test_student import small

SPECIAL = Special(mask=49, pad=47, eos=48)


@pytest.mark.parametrize("per_step", [1, 3])
def test_a_teacher_answers_as_by_hand(per_step: int) -> None:
    model: Any = small()
    prompts = [[1, 2, 3, 4, 5], [6, 7]]
    found, passes = sample_full_attention(model, prompts, SPECIAL, 8, 4, per_step)
    assert passes == 2 * -(-4 // per_step)
    for prompt, row in zip(prompts, found.tolist(), strict=True):
        ids = torch.tensor([prompt + [SPECIAL.mask] * 8])
        for start in range(len(prompt), len(prompt) + 8, 4):
            while (left := [i for i in range(start, start + 4) if ids[0, i] == SPECIAL.mask]) != []:
                with torch.no_grad():
                    seen = full(torch.ones_like(ids, dtype=torch.bool))
                    logits = (
                        model(input_ids=ids, attention_mask=seen, use_cache=False)
                        .logits[0]
                        .double()
                    )
                logits[:, [SPECIAL.mask, SPECIAL.eos]] = -torch.inf
                confidence, tokens = logits.softmax(-1).max(-1)
                for i in sorted(left, key=lambda i: -float(confidence[i]))[:per_step]:
                    ids[0, i] = tokens[i]
        assert ids[0, len(prompt) :].tolist() == row


def _hold(size: int) -> Any:
    return lambda: torch.ones(size // 4)


def _fails() -> Any:
    return lambda: 1 // 0


@pytest.mark.slow
def test_memory_is_that_of_the_job() -> None:
    assert 190e6 < in_process(_hold, 200_000_000) < 260e6
    with pytest.raises(TideError, match="measuring memory failed"):
        in_process(_fails)


def test_quality_is_that_of_the_text() -> None:
    """The embedded teacher likes true text better than the same tokens in another order."""
    teacher = use._load_teacher()
    student = load_for_use(str(Path("teacher_cache/teachers/tiny").resolve()), "cpu")
    blocks = use._blocks(student)[:8]
    true, distinct = use._quality(teacher, 4095, blocks)
    shuffled, same = use._quality(
        teacher, 4095, [(context, block[::-1]) for context, block in blocks]
    )
    assert true < shuffled - 1
    assert distinct == same < 1
    assert use._quality(teacher, 4095, [(c, [b[0]] * 32) for c, b in blocks])[1] == 1 / 32


@pytest.mark.slow
def test_the_table_and_the_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (
        ("_NEW", 32),
        ("_PROMPTS", 2),
        ("_ROUNDS", 1),
        ("_FUNCTIONS", 2),
        ("_STEPS", (2,)),
        ("_THRESHOLDS", (0.5,)),
    ):
        monkeypatch.setattr(use, name, value)
    monkeypatch.setattr(use, "_DEMO", tmp_path / "none")
    monkeypatch.setattr(use, "_train", lambda _: Path("teacher_cache/teachers/tiny").resolve())
    monkeypatch.setattr(use, "in_process", lambda *_: 1_000_000)
    console = Console(record=True, width=120)
    console.print(use.bench_use(tmp_path / "use.png"))
    text = console.export_text()
    for name in (
        "teacher, 1 token a step",
        "student, 2 steps a block",
        "student, threshold 0.5",
        "autoregressive",
        "true text",
    ):
        assert name in text
    assert (tmp_path / "use.png").stat().st_size > 10_000
