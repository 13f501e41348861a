from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shared.settings.objectives import (
    KL,
    Calm,
    Distillation,
    NoDistillation,
    ReverseCalm,
    ReverseKL,
    Tidal,
)
from student_train.losses.calm import chunk_log_likelihood, token_log_likelihood
from student_train.losses.objective import Counts, objective, total
from student_train.losses.targets import ChunkTargets, Targets, rows_of
from tests.student_train.losses.problems import cached

VOCABULARY, N = 12, 6
ALL: list[Distillation] = [
    kind(temperature=2.0, tidal=tidal)
    for kind in (KL, ReverseKL, Calm, ReverseCalm)
    for tidal in (None, Tidal())
]


def targets(teacher: Tensor, k: int = VOCABULARY) -> Targets:
    return Targets(
        gold=torch.arange(N) % VOCABULARY,
        t=torch.linspace(0.1, 0.9, N),
        topk=cached(teacher, k),
        chunks=ChunkTargets(
            torch.tensor([0, 1, 3, 4]), torch.tensor([0, 0, 1, 2]), torch.tensor([-1.0, -0.2, -9.0]),
            torch.tensor([0.1, 0.5, 0.9]),
        ),
    )  # fmt: skip


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_against_the_definition_in_float64(settings: Any) -> None:
    torch.manual_seed(0)
    logits, teacher = torch.randn(N, VOCABULARY) * 2, torch.randn(N, VOCABULARY) * 2
    made = targets(teacher)
    sums = objective(logits, made, settings, 0.35)
    x, z, t, temperature = logits.double(), teacher.double(), made.t.double(), settings.temperature
    gold_logp = torch.log_softmax(x, 1)[torch.arange(N), made.gold]
    torch.testing.assert_close(sums.denoise.double(), (-gold_logp / t).sum(), rtol=1e-6, atol=1e-6)
    growth = (1 - torch.cos(torch.tensor(0.35 * torch.pi, dtype=torch.float64))) / 2
    train = 0.1 + 0.8 * growth
    if isinstance(settings, KL | ReverseKL):
        q, p = torch.log_softmax(x / temperature, 1), torch.log_softmax(z / temperature, 1)
        if settings.tidal:
            lam = (train * (1 - t))[:, None]
            p = torch.log_softmax((1 - lam) * x / temperature + lam * z / temperature, 1)
        a, b = (p, q) if isinstance(settings, KL) else (q, p)
        expected = temperature**2 * (a.exp() * (a - b)).sum()
    else:
        assert made.chunks is not None
        chunk = torch.stack([gold_logp[0] + gold_logp[1], gold_logp[3], gold_logp[4]]) / temperature
        m = (made.chunks.teacher_logp.double() / temperature).exp()
        if settings.tidal:
            lam = train * (1 - made.chunks.t.double())
            m = (1 - lam) * chunk.exp() + lam * m
        ps = chunk.exp()
        if isinstance(settings, Calm):
            expected = -(m * chunk + (1 - m) * torch.log1p(-ps)).sum()
        else:
            expected = -(ps * m.log() + (1 - ps) * torch.log1p(-m)).sum()
    torch.testing.assert_close(sums.distillation.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("settings", ALL, ids=str)
def test_no_masked_position_no_loss_and_finite_gradients(settings: Any) -> None:
    logits = torch.zeros(0, VOCABULARY, requires_grad=True)
    topk = cached(torch.zeros(0, VOCABULARY), 3)
    chunks = ChunkTargets(
        torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0), torch.zeros(0)
    )
    sums = objective(
        logits, Targets(torch.zeros(0).long(), torch.zeros(0), topk, chunks), settings, 0.5
    )
    zero = torch.zeros(())
    loss = total(sums, Counts(zero, zero, zero), settings, 1.0)
    loss.backward()
    assert float(loss.detach()) == 0


def test_each_term_has_its_own_denominator() -> None:
    logits, made = torch.randn(N, VOCABULARY), targets(torch.randn(N, VOCABULARY))
    counts = Counts(torch.tensor(40.0), torch.tensor(8.0), torch.tensor(5.0))
    for settings, denominator in ((KL(), 8), (Calm(), 5)):
        sums = objective(logits, made, settings, 0.0)
        expected = sums.denoise / 40 + 0.7 * sums.distillation / denominator
        torch.testing.assert_close(total(sums, counts, settings, 0.7), expected)
    sums = objective(logits, made, NoDistillation(), 0.0)
    torch.testing.assert_close(total(sums, counts, NoDistillation(), 0.7), sums.denoise / 40)


def test_sums_of_two_halves_are_the_sums_of_the_whole() -> None:
    """What makes accumulation exact: nothing is averaged inside."""
    logits, teacher = torch.randn(N, VOCABULARY), torch.randn(N, VOCABULARY)
    made = targets(teacher, 5)
    assert made.topk is not None
    whole = objective(logits, made, KL(), 0.0)
    halves = []
    for part in (slice(0, 2), slice(2, N)):
        topk = rows_of(made.topk, part)
        halves.append(
            objective(logits[part], Targets(made.gold[part], made.t[part], topk), KL(), 0.0)
        )
    torch.testing.assert_close(whole.denoise, halves[0].denoise + halves[1].denoise)
    torch.testing.assert_close(whole.distillation, halves[0].distillation + halves[1].distillation)


def test_the_student_is_never_clamped() -> None:
    """A student that is sure of the wrong token still feels forward CALM at full strength."""
    logits = torch.zeros(1, 3)
    logits[0, 1] = 60.0
    logits.requires_grad_()
    gold = torch.tensor([0])
    made = Targets(gold, torch.ones(1), None,
                   ChunkTargets(torch.tensor([0]), torch.tensor([0]), torch.tensor([-0.1]), torch.ones(1)))  # fmt: skip
    sums = objective(logits, made, Calm(temperature=1.0), 0.0)
    (gradient,) = torch.autograd.grad(sums.distillation, logits)
    assert float(gradient[0, 0]) == pytest.approx(-float(torch.tensor(-0.1).exp()), rel=1e-4)
    chunk = chunk_log_likelihood(
        token_log_likelihood(logits, gold), torch.tensor([0]), torch.tensor([0]), 1
    )
    assert float(chunk.detach()) == pytest.approx(-60, rel=1e-6)


def test_missing_targets_are_explained() -> None:
    bare = Targets(torch.zeros(1).long(), torch.ones(1))
    with pytest.raises(ValueError, match=r"no top-k targets at temperature 2.0"):
        objective(torch.zeros(1, 3), bare, KL(), 0.0)
    with pytest.raises(ValueError, match="no chunk targets"):
        objective(torch.zeros(1, 3), bare, Calm(), 0.0)
