"""Losses against float64 and golden numbers, with their gradients; padding, empty sets, extreme values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pipelines.conformance import run_conformance
from student_train.losses.buckets import complement_logsumexp, log1mexp, student_buckets, teacher_buckets
from student_train.losses.calm import (
    bound_probability,
    calm,
    chunk_log_likelihood,
    reverse_calm,
    token_log_likelihood,
)
from student_train.losses.denoise import denoise
from student_train.losses.kl import kl, reverse_kl
from student_train.losses.tidal import tidal_distribution, tidal_probability


def test_all_golden_cases(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_conformance(golden, "losses")
    assert "82 passed, 0 failed" in capsys.readouterr().out


def dense_teacher(student: Tensor, teacher: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Log-probabilities over the whole vocabulary: the teacher on its top-k, student-shaped outside. float64."""
    q = torch.log_softmax(student.detach().double() / temperature, 1)
    p = torch.log_softmax(teacher.double() / temperature, 1)
    inside = torch.zeros_like(q, dtype=torch.bool).scatter(1, ids, True)
    tail = torch.logsumexp(p.masked_fill(inside, -torch.inf), 1) - torch.logsumexp(q.masked_fill(inside, -torch.inf), 1)
    return torch.where(inside, p, q + tail[:, None])


def bucketed(student: Tensor, teacher: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    values, ids = teacher.topk(k, 1)
    kept = torch.ones_like(ids, dtype=torch.bool)
    lse = torch.logsumexp(teacher / temperature, 1)
    return (
        student_buckets(student, ids, kept, temperature),
        teacher_buckets(values, kept, lse, temperature, student.shape[1]),
        ids,
    )


@pytest.mark.parametrize("objective", ["kl", "reverse_kl", "tidal", "tidal_reverse"])
@given(seed=st.integers(0, 999), k=st.integers(1, 29), temperature=st.sampled_from([1.0, 2.0, 5.0]))
def test_buckets_are_exactly_the_student_shaped_tail(objective: str, seed: int, k: int, temperature: float) -> None:
    """Value and gradient equal those of the full-vocabulary objective against the dense teacher.

    In float64 to rounding, so the mathematics is the same; in float32 to the resolution of the cached logsumexp.
    """
    torch.manual_seed(seed)
    student, teacher, strength = torch.randn(4, 30).double(), torch.randn(4, 30).double(), torch.rand(4).double()
    term = reverse_kl if "reverse" in objective else kl

    def loss(target: Tensor, log_student: Tensor) -> Tensor:
        if "tidal" in objective:
            target = tidal_distribution(target, log_student, strength.to(log_student.dtype))
        return term(target, log_student).sum()

    def through_buckets(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = student.to(dtype).requires_grad_()
        log_student, log_teacher, _ = bucketed(x, teacher.to(dtype), k, temperature)
        value = loss(log_teacher, log_student)
        return value.detach().double(), torch.autograd.grad(value, x)[0].double()

    x = student.clone().requires_grad_()
    dense = dense_teacher(student, teacher, teacher.topk(k, 1).indices, temperature)
    exact = loss(dense, torch.log_softmax(x / temperature, 1))
    (gradient,) = torch.autograd.grad(exact, x)
    torch.testing.assert_close(through_buckets(torch.float64), (exact.detach(), gradient), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(through_buckets(torch.float32), (exact.detach(), gradient), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("term", [kl, reverse_kl])
def test_k_equal_to_the_vocabulary_is_the_full_loss(term: Any) -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(6, 23) * 4).requires_grad_(), torch.randn(6, 23) * 4
    log_student, log_teacher, _ = bucketed(student, teacher, 23, 2.0)
    (gradient,) = torch.autograd.grad(term(log_teacher, log_student).sum(), student)
    full_student = torch.log_softmax(student.double() / 2, 1)
    expected = term(torch.log_softmax(teacher.double() / 2, 1), full_student).sum()
    (full_gradient,) = torch.autograd.grad(expected, student)
    torch.testing.assert_close(term(log_teacher, log_student).sum().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, full_gradient, rtol=1e-4, atol=1e-6)


def test_padding_of_shorter_lists_changes_nothing() -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(1, 20).requires_grad_(), torch.randn(1, 20) * 3
    values, ids = teacher.topk(4, 1)
    lse = torch.logsumexp(teacher / 2, 1)
    gradients, losses = [], []
    for width in (4, 9):
        pad = width - 4
        wide_ids = torch.cat([ids, ids[:, :1].expand(1, pad)], 1)
        wide_values = torch.cat([values, torch.full((1, pad), 777.0)], 1)
        kept = torch.arange(width)[None] < 4
        q, p = student_buckets(student, wide_ids, kept, 2.0), teacher_buckets(wide_values, kept, lse, 2.0, 20)
        loss = kl(tidal_distribution(p, q, torch.tensor([0.4])), q).sum() + reverse_kl(p, q).sum()
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, student)[0])
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert torch.isfinite(gradients[1]).all()


def test_a_renormalised_top_k_turns_the_gradient_and_the_tail_bucket_does_not() -> None:
    """A teacher that differs from the student in ten tokens only, with much mass outside them."""
    torch.manual_seed(0)
    student = torch.randn(64, 2000).requires_grad_()
    teacher = student.detach().clone()
    teacher[:, :10] += 8

    def cosine(target: Tensor, log_student: Tensor) -> float:
        reference = kl(torch.log_softmax(teacher / 2, 1), torch.log_softmax(student / 2, 1)).sum()
        a, b = (torch.autograd.grad(x, student)[0].flatten() for x in (kl(target, log_student).sum(), reference))
        return float(F.cosine_similarity(a, b, dim=0))

    q, p, ids = bucketed(student, teacher, 10, 2.0)
    assert float(p[:, -1].exp().mean()) > 0.3  # the teacher's mass in the tail
    renormalised = torch.log_softmax(teacher.gather(1, ids) / 2, 1)
    assert cosine(p, q) > 0.99999
    assert cosine(renormalised, torch.log_softmax(student / 2, 1).gather(1, ids)) < 0.999


@given(st.floats(-80, -1e-30))
def test_log1mexp_against_float64(x: float) -> None:
    x = float(torch.tensor(x))  # as float32 holds it
    exact = math.log(-math.expm1(x)) if x > -0.7 else math.log1p(-math.exp(x))
    assert float(log1mexp(torch.tensor(x))) == pytest.approx(exact, rel=3e-6, abs=1e-37)


def test_log1mexp_at_and_above_zero_is_finite_with_a_finite_gradient() -> None:
    x = torch.tensor([0.0, 1e-7, -1e-38], requires_grad=True)
    log1mexp(x).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(log1mexp(x)).all()
    assert torch.isfinite(x.grad[:2]).all()


def test_complement_logsumexp() -> None:
    logits = torch.randn(3, 7)
    ids = torch.tensor([[0, 1], [6, 6], [2, 4]])
    expected = [torch.logsumexp(logits[i, [j for j in range(7) if j not in ids[i].tolist()]], 0) for i in range(3)]
    torch.testing.assert_close(complement_logsumexp(logits, ids), torch.stack(expected))
    whole = torch.arange(7)[None].expand(3, 7)
    logits.requires_grad_()
    complement_logsumexp(logits, whole).sum().backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(3, 7))  # no token left: EMPTY, and no NaN in the gradient


@given(st.integers(0, 99), st.floats(0, 60))
def test_token_log_likelihood_against_float64(seed: int, confidence: float) -> None:
    torch.manual_seed(seed)
    logits, gold = torch.randn(4, 11), torch.randint(0, 11, (4,))
    logits[torch.arange(4), gold] += confidence
    single, double = logits.clone().requires_grad_(), logits.double().requires_grad_()
    value = token_log_likelihood(single, gold)
    others = complement_logsumexp(double, gold[:, None])
    exact = -F.softplus(others - double.gather(1, gold[:, None])[:, 0], threshold=700.0)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-30)
    value.sum().backward()
    exact.sum().backward()
    assert single.grad is not None
    assert double.grad is not None
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-4, atol=1e-30)


def test_chunk_log_likelihood_sums_by_chunk_and_leaves_empty_chunks_at_zero() -> None:
    logp = torch.tensor([-1.0, -2.0, -4.0, -8.0], requires_grad=True)
    total = chunk_log_likelihood(logp, torch.tensor([3, 0, 1]), torch.tensor([0, 2, 2]), 3)
    assert total.tolist() == [-8.0, 0.0, -3.0]
    total.sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == [1, 1, 0, 1]


@given(st.floats(-60, -1e-6), st.floats(0, 1))
def test_calm_against_float64(log_p: float, target: float) -> None:
    t = float(bound_probability(torch.tensor([target]))[0])
    p = math.exp(log_p)
    log_rest = math.log(-math.expm1(log_p))
    forward, backward = -(t * log_p + (1 - t) * log_rest), -(p * math.log(t) + (1 - p) * math.log1p(-t))
    x = torch.tensor([log_p])
    assert float(calm(x, torch.tensor([t]))) == pytest.approx(forward, rel=1e-5, abs=1e-6)
    assert float(reverse_calm(x, torch.tensor([t]))) == pytest.approx(backward, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("log_p", [-1e-3, -1.0, -20.0, -50.0])
def test_the_gradient_of_reverse_calm_is_minus_logit_of_the_teacher(log_p: float) -> None:
    """d/dp_s = −logit(p_t), so d/dlog p_s = −p_s·logit(p_t): bounded, whatever the student says."""
    for target in (1e-7, 0.3, 0.99):
        x = torch.tensor([log_p], dtype=torch.float64, requires_grad=True)
        reverse_calm(x, torch.tensor([target], dtype=torch.float64)).sum().backward()
        assert x.grad is not None
        assert float(x.grad) == pytest.approx(-math.exp(log_p) * math.log(target / (1 - target)), rel=1e-9)


def test_forward_calm_keeps_its_gradient_where_a_clamp_would_lose_it() -> None:
    """The reference clamps p_s at 1e-7; a student at 1e-13 then learns nothing. Ours keeps −p_t."""
    x = torch.tensor([-30.0], requires_grad=True)
    calm(x, torch.tensor([0.8])).sum().backward()
    assert x.grad is not None
    assert float(x.grad) == pytest.approx(-0.8, rel=1e-5)
    clamped = torch.tensor([-30.0], requires_grad=True)
    calm(bound_probability(clamped.exp()).log(), torch.tensor([0.8])).sum().backward()
    assert clamped.grad is not None
    assert float(clamped.grad) == 0.0


def test_extreme_students_give_finite_losses_and_gradients() -> None:
    for log_p in (-0.0, -1e-30, -1e-7, -100.0, -1e4):
        for term in (calm, reverse_calm):
            x = torch.tensor([log_p], requires_grad=True)
            value = term(x, bound_probability(torch.tensor([0.5])))
            value.sum().backward()
            assert torch.isfinite(value).all(), (term, log_p)
            assert x.grad is not None
            if log_p < -1e-20:
                assert torch.isfinite(x.grad).all(), (term, log_p)


def test_tidal_targets_move_from_student_to_teacher_and_carry_no_gradient() -> None:
    q = torch.log_softmax(torch.randn(2, 5), 1).requires_grad_()
    p = torch.log_softmax(torch.randn(2, 5), 1)
    torch.testing.assert_close(tidal_distribution(p, q, torch.zeros(2)), q.detach())
    torch.testing.assert_close(tidal_distribution(p, q, torch.ones(2)), p)
    assert not tidal_distribution(p, q, torch.ones(2)).requires_grad
    s = torch.tensor([0.2, 0.0], requires_grad=True)
    m = tidal_probability(s, torch.tensor([0.6, 0.5]), torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(m, torch.tensor([0.4, 1e-7]))
    assert not m.requires_grad


def test_gradients_in_float64() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    target = torch.log_softmax(torch.randn(3, 6, dtype=torch.float64), 1)
    logp = (-torch.rand(4, dtype=torch.float64) - 0.1).requires_grad_()
    m = torch.rand(4, dtype=torch.float64)
    for term in (kl, reverse_kl):
        assert torch.autograd.gradcheck(lambda v, term=term: term(target, torch.log_softmax(v, 1)), (x,))
    for term in (calm, reverse_calm):
        assert torch.autograd.gradcheck(lambda v, term=term: term(v, m), (logp,))


def test_denoise_is_cross_entropy_over_t() -> None:
    logits, gold, t = torch.randn(5, 9).bfloat16(), torch.randint(0, 9, (5,)), torch.rand(5) + 0.1
    exact = -torch.log_softmax(logits.double(), 1)[torch.arange(5), gold] / t
    torch.testing.assert_close(denoise(logits, gold, t).double(), exact, rtol=1e-5, atol=1e-6)


def test_no_positions_no_loss_and_a_gradient_of_zero() -> None:
    x = torch.zeros(0, 9, requires_grad=True)
    none, ids = torch.zeros(0), torch.zeros(0, 3, dtype=torch.long)
    kept = torch.zeros(0, 3, dtype=torch.bool)
    q, p = student_buckets(x, ids, kept, 2.0), teacher_buckets(torch.zeros(0, 3), kept, none, 2.0, 9)
    loss = kl(p, q).sum() + reverse_kl(p, q).sum() + denoise(x, none.long(), none).sum()
    loss = loss + token_log_likelihood(x, none.long()).sum()
    loss.backward()
    assert float(loss.detach()) == 0
