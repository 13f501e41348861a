"""Losses against float64 and golden numbers, with their gradients; padding, empty sets, extreme values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from student_train.losses.calm import (
    bound_probability,
    calm,
    chunk_log_likelihood,
    complement_logsumexp,
    log1mexp,
    reverse_calm,
    token_log_likelihood,
)
from student_train.losses.objective import denoise
from student_train.losses.tidal import tidal_probability


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
    expected = [
        torch.logsumexp(logits[i, [j for j in range(7) if j not in ids[i].tolist()]], 0)
        for i in range(3)
    ]
    torch.testing.assert_close(complement_logsumexp(logits, ids), torch.stack(expected))
    whole = torch.arange(7)[None].expand(3, 7)
    logits.requires_grad_()
    complement_logsumexp(logits, whole).sum().backward()
    assert logits.grad is not None
    assert torch.equal(
        logits.grad, torch.zeros(3, 7)
    )  # no token left: EMPTY, and no NaN in the gradient


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
    forward, backward = (
        -(t * log_p + (1 - t) * log_rest),
        -(p * math.log(t) + (1 - p) * math.log1p(-t)),
    )
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
        assert float(x.grad) == pytest.approx(
            -math.exp(log_p) * math.log(target / (1 - target)), rel=1e-9
        )


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
    s = torch.tensor([0.2, 0.0], requires_grad=True)
    m = tidal_probability(s, torch.tensor([0.6, 0.5]), torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(m, torch.tensor([0.4, 1e-7]))
    assert not m.requires_grad


def test_gradients_in_float64() -> None:
    torch.manual_seed(0)
    logp = (-torch.rand(4, dtype=torch.float64) - 0.1).requires_grad_()
    m = torch.rand(4, dtype=torch.float64)
    for term in (calm, reverse_calm):
        assert torch.autograd.gradcheck(lambda v, term=term: term(v, m), (logp,))


def test_denoise_is_cross_entropy_over_t() -> None:
    logits, gold, t = torch.randn(5, 9).bfloat16(), torch.randint(0, 9, (5,)), torch.rand(5) + 0.1
    exact = -torch.log_softmax(logits.double(), 1)[torch.arange(5), gold] / t
    torch.testing.assert_close(denoise(logits, gold, t).double(), exact, rtol=1e-5, atol=1e-6)


def test_no_positions_no_loss_and_a_gradient_of_zero() -> None:
    x = torch.zeros(0, 9, requires_grad=True)
    none = torch.zeros(0)
    loss = denoise(x, none.long(), none).sum()
    loss = loss + token_log_likelihood(x, none.long()).sum()
    loss.backward()
    assert float(loss.detach()) == 0
