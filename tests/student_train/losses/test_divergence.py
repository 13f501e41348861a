"""The dense teacher from a top-k, classes and a shape; KL, CALM and TIDAL against float64, with
their gradients; extreme values.
"""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from shared.cache.levels import LARGEST_ODDS
from shared.settings.config import Tidal
from student_train.losses import divergence as d
from student_train.losses import targets
from student_train.losses.objective import denoise
from student_train.losses.targets import Classes, TopKTargets

SHAPES = ("student", "prior")


def cached(
    z: Tensor, k: int, classes: int = 1, shape: str = "student", shared: Any = None, seed: int = 0
) -> TopKTargets:
    """What is cached of a teacher's logits z. `shared`: the tokens that both models have."""
    g = torch.Generator().manual_seed(seed)
    n, vocabulary = z.shape
    allowed = torch.ones(vocabulary, dtype=torch.bool) if shared is None else shared
    logits = z.masked_fill(~allowed, -torch.inf)
    ids = logits.topk(k, 1).indices
    class_of = torch.randint(0, classes, (vocabulary,), generator=g)
    class_of[~allowed] = -1
    odds, mass, prior = {}, {}, {}
    for t in (1.0, 2.0, 5.0):
        p = torch.softmax(logits / t, 1)
        outside = p.scatter(1, ids, 0.0)
        log_odds = outside.sum(1).log() - p.gather(1, ids).sum(1).log()
        odds[t] = log_odds.clamp(-LARGEST_ODDS, LARGEST_ODDS)
        sums = torch.zeros(n, classes, dtype=p.dtype).index_add(1, class_of.clamp_min(0), outside)
        mass[t] = sums.log().clamp_min(-1e30)
        random = torch.randn(vocabulary, generator=g).to(p.dtype)
        prior[t] = torch.log_softmax(random.masked_fill(~allowed, -1e30), 0)
    logp, kept = torch.log_softmax(logits, 1).gather(1, ids), torch.ones_like(ids, dtype=torch.bool)
    known = Classes(class_of, classes, prior)
    masses = mass if classes > 1 else None
    return TopKTargets(ids, logp, kept, odds, known, masses, shape == "student")


def dense_teacher(student: Tensor, teacher: Tensor, topk: TopKTargets, t: float) -> Tensor:
    """The teacher's log-probabilities by the definition, token by token, in float64.

    log p in the top-k, else log M_c + log b(v) − log Σ b(u) over v's class outside the top-k.
    """
    assert topk.classes is not None
    class_of = topk.classes.class_of
    hidden = class_of < 0
    p = torch.log_softmax(teacher.double().masked_fill(hidden, -torch.inf) / t, 1)
    q = torch.log_softmax(student.detach().double().masked_fill(hidden, -torch.inf) / t, 1)
    dense = torch.full_like(p, -torch.inf)
    for i in range(len(p)):
        inside = topk.ids[i].tolist()
        shape = q[i] if topk.student_shaped else topk.classes.log_prior[t].double()
        dense[i, inside] = p[i, inside]
        for c in set(class_of[~hidden].tolist()):
            members = [u for u in range(p.shape[1]) if u not in inside and class_of[u] == c]
            if members:
                mass, whole = (torch.logsumexp(x[members], 0) for x in (p[i], shape))
                dense[i, members] = mass + shape[members] - whole
    return dense


def expected(
    student: Tensor, target: Tensor, allowed: Tensor, t: float, mixed: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Sum of divergences over the allowed tokens and its gradient, by autograd in float64."""
    x = student.detach().double().requires_grad_()
    q, p = torch.log_softmax(x[:, allowed] / t, 1), target[:, allowed]
    if mixed is not None:
        part = mixed.double()[:, None]
        p = torch.log_softmax((1 - part) * q.detach() + part * p, 1)
    value = ((q.exp() * (q - p)) if reverse else (p.exp() * (p - q))).sum()
    return value.detach(), torch.autograd.grad(value, x)[0]


@given(data=st.data(), seed=st.integers(0, 999), reverse=st.booleans(), mixed=st.booleans())
def test_value_and_gradient_in_float64(data: Any, seed: int, reverse: bool, mixed: bool) -> None:
    """With k = V it is the full loss."""
    k, classes = data.draw(st.integers(1, 30)), data.draw(st.sampled_from([1, 3, 7]))
    shape, t = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from([1.0, 2.0, 5.0]))
    # Ids that only one model has: in the table, and rows of the student beyond it.
    unshared, absent = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 2))
    torch.manual_seed(seed)
    student, teacher, strength = torch.randn(3, 30 + absent), torch.randn(3, 30) * 2, torch.rand(3)
    shared = torch.ones(30, dtype=torch.bool)
    shared[torch.randperm(30)[:unshared]] = False
    allowed = F.pad(shared, (0, absent))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 3e-5)):
        topk = cached(teacher.to(dtype), min(k, 30 - unshared), classes, shape, shared, seed)
        x = student.to(dtype).requires_grad_()
        target = F.pad(dense_teacher(x[:, :30], teacher.to(dtype), topk, t), (0, absent))
        part = strength.to(dtype) if mixed else None
        value, gradient = expected(x, target, allowed, t, part, reverse)
        loss = d.token_divergence(x, topk, t, part, reverse).sum()
        (slope,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(loss.detach().double(), value, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(slope.double(), gradient, rtol=tolerance, atol=tolerance)
        assert not slope[:, ~allowed].any()


def test_padding_of_shorter_lists_changes_nothing() -> None:
    torch.manual_seed(1)
    student, teacher, part = torch.randn(1, 20), torch.randn(1, 20) * 3, torch.tensor([0.4])
    for classes, shape, reverse in itertools.product((1, 3), SHAPES, (False, True)):
        topk = cached(teacher, 4, classes, shape)
        ids = torch.cat([topk.ids, topk.ids[:, :1].expand(1, 5)], 1)
        logp = torch.cat([topk.logp, torch.full((1, 5), 777.0)], 1)
        padded = dataclasses.replace(topk, ids=ids, logp=logp, kept=torch.arange(9)[None] < 4)
        narrow = d.divergence_and_gradient(student, topk, 2.0, part, reverse)
        wide = d.divergence_and_gradient(student, padded, 2.0, part, reverse)
        torch.testing.assert_close(wide, narrow)


def test_extremes_stay_finite() -> None:
    """A teacher that is sure, one whose tail is all there is, a student sure of the wrong token."""
    student, teacher = torch.zeros(3, 50), torch.zeros(3, 50)
    student[:, 7], teacher[0, 3], teacher[1] = 90.0, 80.0, torch.linspace(-40, 40, 50)
    parts = (None, torch.full((3,), 0.3))
    for classes, shape, reverse, part in itertools.product((1, 4), SHAPES, (False, True), parts):
        topk = cached(teacher, 2, classes, shape)
        value, gradient = d.divergence_and_gradient(student, topk, 1.0, part, reverse)
        assert torch.isfinite(gradient).all() and ((value > -1e-4) & torch.isfinite(value)).all()
    for term in (d.calm, d.reverse_calm):
        x = torch.tensor([-1e4, -1e-7, -1e-30, 0.0], requires_grad=True)
        value = term(x, d.bound_probability(torch.full((4,), 0.5)))
        (slope,) = torch.autograd.grad(value.sum(), x)
        assert torch.isfinite(value).all() and torch.isfinite(slope[:2]).all()


def test_a_prior_that_the_top_k_has_nearly_all_of_leaves_what_is_left() -> None:
    """What is left is a small difference: in float32 it would be noise."""
    teacher = torch.tensor([[5.0, 4.0, 1.0, 0.0]])
    topk = cached(teacher, 2, shape="prior")
    prior = torch.tensor([0.6, 0.4 - 1.1e-9, 1e-9, 1e-10]).double().log().float()
    assert topk.classes is not None
    classes = dataclasses.replace(topk.classes, log_prior={1.0: prior})
    topk = dataclasses.replace(topk, classes=classes)
    p = targets.teacher_log_probabilities(
        topk, targets.log_student(torch.zeros(1, 4), topk, 1.0), 1.0
    ).exp()
    tail = float(torch.softmax(teacher, 1)[0, 2:].sum())
    assert float(p[0, 2:].sum()) == pytest.approx(tail, rel=1e-4)
    assert float(p[0, 2] / p[0, 3]) == pytest.approx(10, rel=1e-4)


@given(st.floats(-80, -1e-30))
def test_log1mexp_against_float64(x: float) -> None:
    x = float(torch.tensor(x))  # as float32 holds it
    exact = math.log(-math.expm1(x)) if x > -0.7 else math.log1p(-math.exp(x))
    assert float(d.log1mexp(torch.tensor(x))) == pytest.approx(exact, rel=3e-6, abs=1e-37)


def test_no_token_left_is_empty_without_nan_in_the_gradient() -> None:
    logits = torch.randn(3, 7, requires_grad=True)
    left = d.complement_logsumexp(logits, torch.arange(7).expand(3, 7))
    left.sum().backward()
    assert (left < -1e29).all() and logits.grad is not None and not logits.grad.any()


@given(st.integers(0, 99), st.floats(0, 60))
def test_token_log_likelihood_against_float64(seed: int, confidence: float) -> None:
    torch.manual_seed(seed)
    logits, gold = torch.randn(4, 11), torch.randint(0, 11, (4,))
    logits[torch.arange(4), gold] += confidence
    single, double = logits.clone().requires_grad_(), logits.double().requires_grad_()
    value = d.token_log_likelihood(single, gold)
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
    bounded = d.bound_probability(torch.tensor([target]))
    t, log_p = float(bounded), float(x.detach())
    p, log_rest = math.exp(log_p), math.log(-math.expm1(log_p))
    forward = -(t * log_p + (1 - t) * log_rest)
    backward = -(p * math.log(t) + (1 - p) * math.log1p(-t))
    slopes = (-t + (1 - t) * p / (1 - p), -p * (math.log(t) - math.log1p(-t)))
    terms = ((d.calm, forward, slopes[0]), (d.reverse_calm, backward, slopes[1]))
    for term, value, slope in terms:
        loss = term(x, bounded)
        assert float(loss.detach()) == pytest.approx(value, rel=1e-5, abs=1e-6)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert float(gradient) == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_tidals_schedules_are_the_papers_and_its_targets_carry_no_gradient() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    at = [d.training_strength(Tidal(), progress) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert at == pytest.approx([0.1, 0.1 + 0.4 * (1 - math.cos(math.pi / 4)), 0.5, 0.9])
    linear = [d.training_strength(Tidal(growth="linear"), x) for x in (0.0, 0.25, 1.0)]
    assert linear == pytest.approx([0.1, 0.3, 0.9])
    torch.testing.assert_close(d.strength_at(Tidal(axis="both"), 0.5, t), 0.5 * (1 - t))
    torch.testing.assert_close(d.strength_at(Tidal(axis="training_only"), 0.5, t), 0.5 + 0 * t)
    torch.testing.assert_close(d.strength_at(Tidal(axis="timestep_only"), 0.5, t), 0.9 * (1 - t))
    assert d.timestep_weight("uniform", t).tolist() == [1, 1, 1]
    weights = d.timestep_weight("midrange", torch.tensor([0.5, 0.65, 0.35]))
    torch.testing.assert_close(weights, torch.tensor([1, math.exp(-0.5), math.exp(-0.5)]))
    student = torch.tensor([0.2, 0.0], requires_grad=True)
    mixed = d.tidal_probability(student, torch.tensor([0.6, 0.5]), torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(mixed, torch.tensor([0.4, 1e-7]))
    assert not mixed.requires_grad


def test_denoise_is_cross_entropy_over_t_in_float32() -> None:
    logits, gold, t = torch.randn(5, 9).bfloat16(), torch.randint(0, 9, (5,)), torch.rand(5) + 0.1
    exact = -torch.log_softmax(logits.double(), 1)[torch.arange(5), gold] / t
    torch.testing.assert_close(denoise(logits, gold, t).double(), exact, rtol=1e-5, atol=1e-6)
