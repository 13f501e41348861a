from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shared.settings.objectives import (
    KL,
    Calm,
    Distillation,
    NoDistillation,
    ReverseCalm,
    ReverseKL,
    Tidal,
)
from student_train.losses.fused_head import LossSettings, fused_loss
from student_train.losses.objective import Counts, objective, total
from student_train.losses.targets import ChunkTargets, Targets, slice_targets
from tests.student_train.losses.problems import cached

OBJECTIVES: dict[str, Distillation] = {
    "ce": NoDistillation(),
    "kl": KL(),
    "reverse_kl": ReverseKL(temperature=1.0),
    "tidal": KL(tidal=Tidal()),
    "calm": Calm(),
    "reverse_calm": ReverseCalm(),
    "calm_tidal": Calm(tidal=Tidal()),
}


def problem(
    n: int, vocab: int, width: int, seed: int = 0, k: int = 4
) -> tuple[Tensor, Tensor, Targets, Counts]:
    """Random hidden states, head and targets; chunks of one to four rows, some rows in none."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=g)
    head = torch.randn(vocab, width, generator=g) / width**0.5 * 3
    teacher = torch.randn(n, vocab, generator=g) * 2
    topk = cached(teacher, min(k, vocab), 3, "prior", seed=seed)
    rows, owner, place, count = [], [], 0, 0
    while place < n:
        length = int(torch.randint(0, 5, (1,), generator=g))
        rows += range(place, min(n, place + length))
        owner += [count] * (min(n, place + length) - place)
        count += min(n, place + length) > place
        place += length + int(torch.randint(0, 2, (1,), generator=g))
    chunks = ChunkTargets(
        torch.tensor(rows, dtype=torch.long),
        torch.tensor(owner, dtype=torch.long),
        -torch.rand(count, generator=g) * 5,
        torch.rand(count, generator=g),
    )
    gold = torch.randint(0, vocab, (n,), generator=g)
    targets = Targets(gold, torch.rand(n, generator=g) * 0.9 + 0.05, topk, chunks)
    counts = Counts(
        torch.tensor(3.0 * n + 1),
        torch.tensor(float(max(n, 1))),
        torch.tensor(float(max(count, 1))),
    )
    return hidden, head, targets, counts


def plain(hidden: Tensor, head: Tensor, targets: Targets, settings: LossSettings) -> Tensor:
    sums = objective(hidden @ head.T, targets, settings.distillation, settings.progress)
    return total(sums, settings.counts, settings.distillation, settings.weight)


def gradients(function: Any, hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    loss = function(hidden, head)
    (loss * 0.7).backward()
    assert hidden.grad is not None
    assert head.grad is not None
    return loss.detach(), hidden.grad, head.grad


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_equal_to_the_plain_loss_and_gradients(name: str, rows: int) -> None:
    hidden, head, targets, counts = problem(41, 53, 16)
    settings = LossSettings(OBJECTIVES[name], 1.3, counts, 0.4)
    expected = gradients(lambda h, w: plain(h, w, targets, settings), hidden, head)
    found = gradients(lambda h, w: fused_loss(h, w, targets, settings, rows)[0], hidden, head)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))
    exact = gradients(
        lambda h, w: plain(h, w, doubled(targets), settings), hidden.double(), head.double()
    )
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def doubled(targets: Targets) -> Targets:
    """The same targets in float64."""
    assert targets.topk is not None
    assert targets.chunks is not None
    topk, wide = targets.topk, lambda table: {t: v.double() for t, v in table.items()}
    assert topk.class_mass is not None and topk.classes is not None
    topk = dataclasses.replace(
        topk,
        logp=topk.logp.double(),
        odds=wide(topk.odds),
        class_mass=wide(topk.class_mass),
        classes=dataclasses.replace(topk.classes, log_prior=wide(topk.classes.log_prior)),
    )
    chunks = dataclasses.replace(
        targets.chunks,
        teacher_logp=targets.chunks.teacher_logp.double(),
        t=targets.chunks.t.double(),
    )
    return Targets(targets.gold, targets.t.double(), topk, chunks)


@given(n=st.integers(0, 60), size=st.integers(1, 70), seed=st.integers(0, 99))
def test_slices_cover_every_row_and_chunk_once(n: int, size: int, seed: int) -> None:
    _, _, targets, _ = problem(n, 11, 4, seed)
    assert targets.chunks is not None
    rows, likelihoods, tokens = [], [], 0
    for part, own in slice_targets(targets, size):
        rows += range(part.start, part.stop)
        assert own.gold.tolist() == targets.gold[part].tolist()
        assert own.chunks is not None
        likelihoods += own.chunks.teacher_logp.tolist()
        tokens += own.chunks.rows.numel()
        assert part.stop - part.start <= max(size, 4)
        if own.chunks.rows.numel():
            assert (
                0
                <= int(own.chunks.rows.min())
                <= int(own.chunks.rows.max())
                < part.stop - part.start
            )
            assert int(own.chunks.chunk_of.max()) == own.chunks.teacher_logp.numel() - 1
    assert rows == list(range(n))
    assert likelihoods == targets.chunks.teacher_logp.tolist()
    assert tokens == targets.chunks.rows.numel()


def expect_zero_where_nothing_is_masked(loss_of: Any, distillation: Distillation) -> None:
    hidden, head, targets, counts = problem(0, 11, 4)
    settings = LossSettings(distillation, 1.0, counts, 0.5)
    loss, grad_hidden, grad_head = gradients(
        lambda h, w: loss_of(h, w, targets, settings)[0], hidden, head
    )
    assert loss == 0
    assert grad_hidden.shape == (0, 4)
    assert not grad_head.any()


def test_nothing_masked_is_a_loss_of_zero_with_zero_gradients() -> None:
    expect_zero_where_nothing_is_masked(fused_loss, KL())


def test_a_frozen_head_and_evaluation_without_gradients() -> None:
    hidden, head, targets, counts = problem(9, 11, 4)
    settings = LossSettings(KL(), 1.0, counts, 0.5)
    hidden.requires_grad_()
    fused_loss(hidden, head, targets, settings, 2)[0].backward()
    assert hidden.grad is not None
    with torch.no_grad():
        loss, sums = fused_loss(hidden, head, targets, settings, 2)
    torch.testing.assert_close(loss, plain(hidden, head, targets, settings).detach())
    assert not sums.denoise.requires_grad


def test_autocast_keeps_the_head_s_gradient_in_float32() -> None:
    hidden, head, targets, counts = problem(64, 301, 32)
    settings = LossSettings(KL(), 1.0, counts, 0.5)
    exact = gradients(lambda h, w: plain(h, w, targets, settings), hidden, head)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(lambda h, w: fused_loss(h, w, targets, settings, 8)[0], hidden, head)
    assert [x.dtype for x in found] == [torch.float32] * 3
    for a, b in zip(found, exact, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.02


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in numbers."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("name", OBJECTIVES)
def test_full_logits_never_exist(name: str) -> None:
    """No tensor is larger than the head, its gradient, or a slice's logits."""
    hidden, head, targets, counts = problem(512, 700, 8)
    settings = LossSettings(OBJECTIVES[name], 1.0, counts, 0.5)
    with Largest() as seen:
        gradients(lambda h, w: fused_loss(h, w, targets, settings, 16)[0], hidden, head)
    assert seen.numbers == max(head.numel(), 16 * 700)
    with Largest() as seen:
        gradients(lambda h, w: plain(h, w, targets, settings), hidden, head)
    assert seen.numbers >= 512 * 700


class Waits(TorchDispatchMode):
    """Operations after which the host waits for the device, or whose result has a size that only the device knows."""

    found: ClassVar[set[str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        by_mask = name == "aten::index" and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        waits = (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::unique_consecutive",
            "aten::masked_select",
        )
        if by_mask or name in waits:
            self.found.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_slice_waits_for_the_device(name: str) -> None:
    hidden, head, targets, counts = problem(50, 30, 8)
    assert targets.chunks is not None
    host = torch.stack([targets.chunks.rows, targets.chunks.chunk_of]).numpy()
    targets = dataclasses.replace(targets, chunks=dataclasses.replace(targets.chunks, host=host))
    settings = LossSettings(OBJECTIVES[name], 1.0, counts, 0.5)
    with Waits() as seen:
        gradients(lambda h, w: fused_loss(h, w, targets, settings, 16)[0], hidden, head)
    assert seen.found == set()
