"""The dense teacher from a top-k and its linear tail; KL, CALM and TIDAL against float64, with
their gradients; extreme values.
"""

import dataclasses
import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from shared.cache.levels import EMPTY
from shared.cache.tail import LinearTail
from shared.settings.config import KL, ReverseKL, Tidal
from student_train.losses import divergence as d
from student_train.losses.objective import denoise
from student_train.losses.targets import TopKTargets

CACHED = (1.0, 2.0)  # temperatures; others are read from the first


def cached(z: Tensor, k: int, rank: int, shared: Tensor, seed: int = 0) -> TopKTargets:
    """A teacher whose top-k is that of the logits z, outside of it a tail of random numbers.
    `shared`: the student's ids that the teacher has, whose logits are the first of z.
    """
    g, (n, vocabulary) = torch.Generator().manual_seed(seed), z.shape
    allowed = shared[:vocabulary]
    ids = z.masked_fill(~allowed, -torch.inf).topk(k, 1).indices
    logp = torch.log_softmax(z.masked_fill(~allowed, -torch.inf), 1).gather(1, ids)
    random = partial(torch.randn, generator=g, dtype=z.dtype)
    base = {t: random(len(shared)).masked_fill(~shared, EMPTY) for t in CACHED}
    directions = random(len(shared), rank) * shared[:, None]
    tail = LinearTail(directions, base, None if shared.all() else ~shared)
    level = {t: random(n) - 3 for t in CACHED}
    kept = torch.ones_like(ids, dtype=torch.bool)
    return TopKTargets(ids, logp, kept, random(n, rank), level, tail)


def value_and_gradient(student: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    logits = student.clone().requires_grad_()
    value = d.token_divergence(logits, *how)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


def dense_teacher(topk: TopKTargets, shared: Tensor, t: float) -> Tensor:
    """The teacher's log-probabilities by the definition, token by token, in float64."""
    tail, at = topk.tail, t if t in CACHED else 1.0
    dense = torch.full((len(topk.ids), len(shared)), -torch.inf, dtype=torch.float64)
    for i, v in itertools.product(range(len(dense)), shared.nonzero().flatten().tolist()):
        inside = (topk.ids[i] == v).nonzero().flatten().tolist()
        if inside:
            dense[i, v] = topk.logp[i, inside[0]].double() / t
        else:
            x = float(topk.code[i].double() @ tail.directions[v].double()) / at
            dense[i, v] = (float(tail.base[at][v]) + x + float(topk.level[at][i])) * at / t
    return torch.log_softmax(dense, 1)


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
def test_value_and_gradient_against_the_definition(
    data: Any, seed: int, reverse: bool, mixed: bool
) -> None:
    """With k = V it is the full loss."""
    k, rank = data.draw(st.integers(1, 30)), data.draw(st.sampled_from([0, 1, 6]))
    t = data.draw(st.sampled_from([0.7, 1.0, 2.0, 5.0]))
    # Ids that only one model has: in the table, and rows of the student beyond it.
    unshared, absent = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 2))
    torch.manual_seed(seed)
    student, teacher, strength = torch.randn(3, 30 + absent), torch.randn(3, 30) * 2, torch.rand(3)
    shared = torch.ones(30, dtype=torch.bool)
    shared[torch.randperm(30)[:unshared]] = False
    allowed, k = F.pad(shared, (0, absent)), min(k, 30 - unshared)
    settings = ReverseKL(t) if reverse else KL(t)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 3e-5)):
        topk = cached(teacher.to(dtype), k, rank, allowed, seed)
        x = student.to(dtype).requires_grad_()
        target = dense_teacher(topk, allowed, t)
        part = strength.to(dtype) if mixed else None
        value, gradient = expected(x, target, allowed, t, part, reverse)
        loss = d.token_divergence(x, topk, settings, part).sum()
        (slope,) = torch.autograd.grad(loss, x)
        torch.testing.assert_close(loss.detach().double(), value, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(slope.double(), gradient, rtol=tolerance, atol=tolerance)
        assert not slope[:, ~allowed].any()
        if k == 30 - unshared:
            whole = TopKTargets.whole(F.pad(teacher.to(dtype), (0, absent)), allowed)
            full = d.token_divergence(x, whole, settings, part).sum()
            torch.testing.assert_close(full, loss, rtol=tolerance, atol=tolerance)


def test_padding_of_shorter_lists_changes_nothing() -> None:
    torch.manual_seed(1)
    student, teacher, part = torch.randn(1, 20), torch.randn(1, 20) * 3, torch.tensor([0.4])
    topk = cached(teacher, 4, 3, torch.ones(20, dtype=torch.bool))
    ids = torch.cat([topk.ids, topk.ids[:, :1].expand(1, 5)], 1)
    logp = torch.cat([topk.logp, torch.full((1, 5), 777.0)], 1)
    padded = dataclasses.replace(topk, ids=ids, logp=logp, kept=torch.arange(9)[None] < 4)
    for settings in (KL(), ReverseKL()):
        narrow, wide = (value_and_gradient(student, x, settings, part) for x in (topk, padded))
        torch.testing.assert_close(wide, narrow)


def test_extremes_stay_finite() -> None:
    """A teacher that is sure, one whose tail is all there is, a student sure of the wrong token."""
    student, teacher = torch.zeros(3, 50), torch.zeros(3, 50)
    student[:, 7], teacher[0, 3], teacher[1] = 90.0, 80.0, torch.linspace(-40, 40, 50)
    shared = torch.ones(50, dtype=torch.bool)
    shared[9] = False
    topk = cached(teacher, 2, 4, shared)
    topk = dataclasses.replace(topk, level={1.0: torch.tensor([-120.0, 120.0, 0.0])})
    parts = (None, torch.full((3,), 0.3))
    for settings, part in itertools.product((KL(1.0), ReverseKL(1.0)), parts):
        value, gradient = value_and_gradient(student, topk, settings, part)
        assert torch.isfinite(gradient).all() and ((value > -1e-4) & torch.isfinite(value)).all()
    for term in (d.calm, d.reverse_calm):
        x = torch.tensor([-1e4, -1e-7, -1e-30, 0.0], requires_grad=True)
        value = term(x, d.bound_probability(torch.full((4,), 0.5)))
        (slope,) = torch.autograd.grad(value.sum(), x)
        assert torch.isfinite(value).all() and torch.isfinite(slope[:2]).all()


@given(st.floats(-80, -1e-30))
def test_log1mexp_against_float64(x: float) -> None:
    x = float(torch.tensor(x))  # as float32 holds it
    exact = math.log(-math.expm1(x)) if x > -0.7 else math.log1p(-math.exp(x))
    assert float(d.log1mexp(torch.tensor(x))) == pytest.approx(exact, rel=3e-6, abs=1e-37)


def test_the_only_token_is_certain_without_nan_in_the_gradient() -> None:
    logits = torch.randn(3, 1, requires_grad=True)
    sure = d.token_log_likelihood(logits, torch.zeros(3, dtype=torch.long))
    sure.sum().backward()
    assert not sure.any() and logits.grad is not None and not logits.grad.any()


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


class Operators(TorchDispatchMode):
    """Notes what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@given(st.lists(st.integers(0, 5), max_size=6), st.integers(0, 2**31))
def test_tokens_of_chunks_are_added_up_in_one_order(lengths: list[int], seed: int) -> None:
    """On CUDA too, where an `index_add` of three numbers has one sum today and another tomorrow."""
    g, n = torch.Generator().manual_seed(seed), sum(lengths) + 3
    rows = torch.randperm(n, generator=g)[: sum(lengths)].sort().values
    logp = torch.randn(n, generator=g, dtype=torch.float64).requires_grad_()
    weights = torch.randn(len(lengths), generator=g, dtype=torch.float64)
    chunk_of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths).long())
    with Operators() as run:
        sums = d.chunk_log_likelihood(logp, rows, chunk_of, len(lengths))
        (gradient,) = torch.autograd.grad(sums @ weights, logp)
    parts = [part.sum() for part in logp.detach()[rows].split(lengths)]
    torch.testing.assert_close(list(sums.detach()), parts, rtol=1e-12, atol=1e-12)
    assert gradient.equal(torch.zeros(n).double().index_put((rows,), weights[chunk_of]))
    assert not {name for name in run.names if "index_add" in name or "scatter_add" in name}
