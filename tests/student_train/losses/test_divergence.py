"""The dense teacher from a top-k, classes and a shape, and the divergences from it."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from student_train.losses.divergence import divergence_and_gradient, token_divergence
from student_train.losses.targets import log_student
from student_train.losses.targets import teacher_log_probabilities as teacher_logp
from tests.student_train.losses.problems import Shape, cached, dense_teacher

SHAPES: tuple[Shape, ...] = ("student", "prior")


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
        loss = token_divergence(x, topk, t, part, reverse).sum()
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
        narrow = divergence_and_gradient(student, topk, 2.0, part, reverse)
        wide = divergence_and_gradient(student, padded, 2.0, part, reverse)
        torch.testing.assert_close(wide, narrow)


def test_extremes_stay_finite() -> None:
    """A teacher that is sure, one whose tail is all there is, a student sure of the wrong token."""
    student, teacher = torch.zeros(3, 50), torch.zeros(3, 50)
    student[:, 7], teacher[0, 3], teacher[1] = 90.0, 80.0, torch.linspace(-40, 40, 50)
    parts = (None, torch.full((3,), 0.3))
    for classes, shape, reverse, part in itertools.product((1, 4), SHAPES, (False, True), parts):
        topk = cached(teacher, 2, classes, shape)
        value, gradient = divergence_and_gradient(student, topk, 1.0, part, reverse)
        assert torch.isfinite(gradient).all() and ((value > -1e-4) & torch.isfinite(value)).all()


def test_a_prior_that_the_top_k_has_nearly_all_of_leaves_what_is_left() -> None:
    """What is left is a small difference: in float32 it would be noise."""
    teacher = torch.tensor([[5.0, 4.0, 1.0, 0.0]])
    topk = cached(teacher, 2, shape="prior")
    prior = torch.tensor([0.6, 0.4 - 1.1e-9, 1e-9, 1e-10]).double().log().float()
    assert topk.classes is not None
    classes = dataclasses.replace(topk.classes, log_prior={1.0: prior})
    topk = dataclasses.replace(topk, classes=classes)
    p = teacher_logp(topk, log_student(torch.zeros(1, 4), topk, 1.0), 1.0).exp()
    tail = float(torch.softmax(teacher, 1)[0, 2:].sum())
    assert float(p[0, 2:].sum()) == pytest.approx(tail, rel=1e-4)
    assert float(p[0, 2] / p[0, 3]) == pytest.approx(10, rel=1e-4)


COMPILED = """
import itertools, torch
from student_train.losses.divergence import divergence_and_gradient
from tests.student_train.losses.problems import cached
compiled = torch.compile(divergence_and_gradient, dynamic=True)
for reverse, shape, rows in itertools.product((False, True), ("prior", "student"), (7, 12, 5)):
    torch.manual_seed(rows)
    student, teacher = torch.randn(rows, 300).double(), torch.randn(rows, 300).double()
    given = (student, cached(teacher, 16, 8, shape), 2.0, torch.rand(rows).double(), reverse)
    plain = divergence_and_gradient(*given)
    torch.testing.assert_close(compiled(*given), plain, rtol=1e-9, atol=1e-12)
print("the same")
"""


@pytest.mark.slow
def test_compiled_it_is_the_same() -> None:
    """By inductor's C++ backend, in a process of its own: shapes are not enforced in there."""
    command = [sys.executable, "-W", "ignore", "-c", COMPILED]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "the same\n", done.stderr[-2000:]
