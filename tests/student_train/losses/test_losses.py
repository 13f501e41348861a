"""CALM, TIDAL and the denoising loss against float64, with their gradients; extreme values."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from shared.settings.config import Tidal
from student_train.losses import divergence as tidal
from student_train.losses.divergence import (
    bound_probability,
    calm,
    complement_logsumexp,
    log1mexp,
    reverse_calm,
    token_log_likelihood,
)
from student_train.losses.objective import denoise


@given(st.floats(-80, -1e-30))
def test_log1mexp_against_float64(x: float) -> None:
    x = float(torch.tensor(x))  # as float32 holds it
    exact = math.log(-math.expm1(x)) if x > -0.7 else math.log1p(-math.exp(x))
    assert float(log1mexp(torch.tensor(x))) == pytest.approx(exact, rel=3e-6, abs=1e-37)


def test_no_token_left_is_empty_without_nan_in_the_gradient() -> None:
    logits = torch.randn(3, 7, requires_grad=True)
    left = complement_logsumexp(logits, torch.arange(7).expand(3, 7))
    left.sum().backward()
    assert (left < -1e29).all() and logits.grad is not None and not logits.grad.any()


@given(st.integers(0, 99), st.floats(0, 60))
def test_token_log_likelihood_against_float64(seed: int, confidence: float) -> None:
    torch.manual_seed(seed)
    logits, gold = torch.randn(4, 11), torch.randint(0, 11, (4,))
    logits[torch.arange(4), gold] += confidence
    single, double = logits.clone().requires_grad_(), logits.double().requires_grad_()
    value = token_log_likelihood(single, gold)
    rest = double.scatter(1, gold[:, None], -torch.inf).logsumexp(1)
    exact = -F.softplus(rest - double.gather(1, gold[:, None])[:, 0], threshold=700.0)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-30)
    (slope,) = torch.autograd.grad(value.sum(), single)
    (expected,) = torch.autograd.grad(exact.sum(), double)
    torch.testing.assert_close(slope.double(), expected, rtol=1e-4, atol=1e-30)


@given(st.floats(-60, -1e-6), st.floats(0, 1))
def test_calm_and_its_gradients_against_float64(log_p: float, target: float) -> None:
    """Of Reverse CALM d/dp_s = −logit(p_t), so d/dlog p_s = −p_s·logit(p_t): bounded."""
    x = torch.tensor([log_p], requires_grad=True)
    bounded = bound_probability(torch.tensor([target]))
    t, log_p = float(bounded), float(x.detach())
    p, log_rest = math.exp(log_p), math.log(-math.expm1(log_p))
    forward = -(t * log_p + (1 - t) * log_rest)
    backward = -(p * math.log(t) + (1 - p) * math.log1p(-t))
    slopes = (-t + (1 - t) * p / (1 - p), -p * (math.log(t) - math.log1p(-t)))
    for term, value, slope in zip((calm, reverse_calm), (forward, backward), slopes, strict=True):
        loss = term(x, bounded)
        assert float(loss.detach()) == pytest.approx(value, rel=1e-5, abs=1e-6)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert float(gradient) == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_forward_calm_keeps_its_gradient_where_a_clamp_would_lose_it() -> None:
    """The reference clamps p_s at 1e-7; a student at 1e-13 then learns nothing. Ours keeps −p_t."""
    x = torch.tensor([-30.0], requires_grad=True)
    (slope,) = torch.autograd.grad(calm(x, torch.tensor([0.8])).sum(), x)
    assert float(slope) == pytest.approx(-0.8, rel=1e-5)
    clamped = bound_probability(x.exp()).log()
    (lost,) = torch.autograd.grad(calm(clamped, torch.tensor([0.8])).sum(), x)
    assert float(lost) == 0.0


def test_extreme_students_give_finite_losses_and_gradients() -> None:
    for log_p in (0.0, -1e-30, -1e-7, -1e4):
        for term in (calm, reverse_calm):
            x = torch.tensor([log_p], requires_grad=True)
            value = term(x, bound_probability(torch.tensor([0.5])))
            (slope,) = torch.autograd.grad(value.sum(), x)
            assert torch.isfinite(value).all(), (term, log_p)
            assert torch.isfinite(slope).all() or log_p > -1e-20, (term, log_p)


def test_tidals_schedules_are_the_papers() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    at = [tidal.training_strength(Tidal(), progress) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert at == pytest.approx([0.1, 0.1 + 0.4 * (1 - math.cos(math.pi / 4)), 0.5, 0.9])
    linear = [tidal.training_strength(Tidal(growth="linear"), x) for x in (0.0, 0.25, 1.0)]
    assert linear == pytest.approx([0.1, 0.3, 0.9])
    torch.testing.assert_close(tidal.strength_at(Tidal(axis="both"), 0.5, t), 0.5 * (1 - t))
    torch.testing.assert_close(tidal.strength_at(Tidal(axis="training_only"), 0.5, t), 0.5 + 0 * t)
    torch.testing.assert_close(
        tidal.strength_at(Tidal(axis="timestep_only"), 0.5, t), 0.9 * (1 - t)
    )
    assert tidal.timestep_weight("uniform", t).tolist() == [1, 1, 1]
    weights = tidal.timestep_weight("midrange", torch.tensor([0.5, 0.65, 0.35]))
    torch.testing.assert_close(weights, torch.tensor([1, math.exp(-0.5), math.exp(-0.5)]))


def test_tidal_targets_move_from_student_to_teacher_and_carry_no_gradient() -> None:
    student = torch.tensor([0.2, 0.0], requires_grad=True)
    mixed = tidal.tidal_probability(student, torch.tensor([0.6, 0.5]), torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(mixed, torch.tensor([0.4, 1e-7]))
    assert not mixed.requires_grad


def test_denoise_is_cross_entropy_over_t_in_float32() -> None:
    logits, gold, t = torch.randn(5, 9).bfloat16(), torch.randint(0, 9, (5,)), torch.rand(5) + 0.1
    exact = -torch.log_softmax(logits.double(), 1)[torch.arange(5), gold] / t
    torch.testing.assert_close(denoise(logits, gold, t).double(), exact, rtol=1e-5, atol=1e-6)
