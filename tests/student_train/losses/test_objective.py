"""The whole objective against float64, and the LM head with the loss in slices against it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils._python_dispatch import TorchDispatchMode

from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit
from shared.models.loading import head_rows
from shared.settings import config as objectives
from shared.settings.build import strict
from shared.settings.config import KL, Calm, Gold, NoDistillation, ReverseKL, Taught, Tidal
from student_train.batches.collate import TargetReader, collate
from student_train.losses import objective as losses
from student_train.losses.divergence import strength_at, training_strength
from student_train.losses.objective import Counts, LossSettings, fused_loss, objective, total
from student_train.losses.targets import ChunkTargets, Targets, TopKTargets, slice_targets
from teacher_cache.run.build import build_cache
from teacher_cache.run.open import open_or_begin
from teacher_cache.run.work import load_engine, prepare_unit
from tests.conftest import chats_file, small_cache_config
from tests.reading import layout_of, rows_in
from tests.student_train.losses.test_divergence import cached
from tests.student_train.losses.test_divergence import expected as divergence_of


@strict
class OfTokens(Taught):
    """As a user's own: the gradient is autograd's."""

    needs: ClassVar = "topk"
    type: str = "own:OfTokens"

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (teacher.exp() * (teacher - student)).sum(dim=1)


@strict
class OfChunks(Taught):
    needs: ClassVar = "chunks"
    type: str = "own:OfChunks"

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student.exp() - teacher) ** 2


OBJECTIVES = (
    *(NoDistillation(), Gold(), KL(tidal=Tidal())),
    *(ReverseKL(temperature=1.0), Calm(tidal=Tidal())),
    *(OfTokens(tidal=Tidal()), OfChunks()),
)


def problem(n: int, vocab: int, width: int, seed: int = 0, k: int = 4) -> tuple[Any, ...]:
    """Hidden states, head, targets, counts; chunks of one to four rows, some rows in none."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=g)
    head = torch.randn(vocab, width, generator=g) / width**0.5 * 3
    teacher = torch.randn(n, vocab, generator=g) * 2
    rows = [row for row in range(n) if row % 4 <= row // 4 % 4]
    both, count = torch.tensor([rows, [row // 4 for row in rows]]).long(), -(-n // 4)
    logp, rate = -torch.rand(count, generator=g) * 5, torch.rand(count, generator=g)
    chunks = ChunkTargets(both[0], both[1], logp, rate, both.numpy())
    gold = torch.randint(0, vocab, (n,), generator=g)
    topk = cached(teacher, min(k, vocab), 3, torch.ones(vocab, dtype=torch.bool), seed)
    targets = Targets(gold, torch.rand(n, generator=g) * 0.9 + 0.05, topk, chunks)
    counts = torch.tensor([3.0 * n + 1, max(n, 1), max(count, 1)])
    return hidden, head, targets, Counts(*counts)


def plain(hidden: Tensor, head: Tensor, targets: Targets, settings: LossSettings) -> Tensor:
    sums = objective(hidden @ head.T, targets, settings.distillation, settings.progress)
    return total(sums, settings.counts, settings.distillation, settings.weight)


def gradients(loss_of: Callable, hidden: Tensor, head: Tensor, *rest: Any) -> list[Tensor]:
    """The loss and its gradients by hidden states and head."""
    hidden, head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    loss = loss_of(hidden, head, *rest)
    loss = loss if isinstance(loss, Tensor) else loss[0]
    return [loss.detach(), *torch.autograd.grad(loss * 0.7, (hidden, head))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["KL", "Calm"])
def test_slices_of_any_size_run_in_graphs_of_a_fixed_vocabulary(kind: str) -> None:
    """In a process without the tests' import hook, which torch.compile would trace through."""
    command, path = [sys.executable, "-m", __name__, kind], {**os.environ, "PYTHONPATH": "."}
    done = subprocess.run(command, env=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def run_slices_of_any_size(settings: Taught) -> None:
    """With more sizes than PyTorch compiles for by default."""
    graphs, vocabulary, ran = [], 37, []

    def count(module: Any, inputs: list[Any]) -> Callable:
        sizes = [size for x in inputs if isinstance(x, Tensor) for size in x.shape]
        graphs.append([size for size in sizes if free_symbols(size) and size == vocabulary])
        return lambda *given: ran.append(1) or module(*given)

    made = losses._compiled_objective(backend=count)
    losses._compiled_objective = lambda: made  # type: ignore[assignment]
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 21):
        *given, targets, counts = problem(n, vocabulary, 3)
        how, before = (targets, LossSettings(settings, 2.0, counts, 0.3)), len(ran)
        result = gradients(fused_loss, *given, *how, 64, True)
        assert len(ran) == before + 1, f"{n} rows ran uncompiled, after {len(graphs)} graphs"
        torch.testing.assert_close(result, gradients(plain, *given, *how))
    assert not any(graphs)


@pytest.mark.parametrize("tidal", [None, Tidal()], ids=["plain", "tidal"])
@pytest.mark.parametrize("kind", ["KL", "ReverseKL", "Calm", "ReverseCalm"])
def test_against_the_definition_in_float64(kind: str, tidal: Tidal | None) -> None:
    settings = getattr(objectives, kind)(temperature=2.0, tidal=tidal)
    torch.manual_seed(0)
    logits, teacher = torch.randn(6, 12) * 2, torch.randn(6, 12) * 2
    logp, rate = torch.tensor([-1.0, -0.2, -9.0]), torch.tensor([0.1, 0.5, 0.9])
    chunks = ChunkTargets(torch.tensor([0, 1, 3, 4]), torch.tensor([0, 0, 1, 2]), logp, rate)
    whole = TopKTargets.whole(teacher, torch.ones(12, dtype=torch.bool))
    targets = Targets(torch.arange(6), torch.linspace(0.1, 0.9, 6), whole, chunks)
    sums = objective(logits, targets, settings, 0.35)
    x, z, t, temperature = logits.double(), teacher.double(), targets.t.double(), 2.0
    gold_logp = torch.log_softmax(x, 1)[torch.arange(6), targets.gold]
    torch.testing.assert_close(sums.denoise.double(), (-gold_logp / t).sum(), rtol=1e-6, atol=1e-6)
    train = 0.1 + 0.8 * (1 - torch.cos(torch.tensor(0.35 * torch.pi).double())) / 2
    if isinstance(settings, KL | ReverseKL):
        p, part = torch.log_softmax(z / temperature, 1), train * (1 - t) if tidal else None
        rest = (torch.ones(12, dtype=torch.bool), temperature, part, kind == "ReverseKL")
        expected = temperature**2 * divergence_of(x, p, *rest)[0]
    else:
        chunk = torch.stack([gold_logp[0] + gold_logp[1], gold_logp[3], gold_logp[4]]) / temperature
        m, ps = (chunks.teacher_logp.double() / temperature).exp(), chunk.exp()
        if settings.tidal:
            lam = train * (1 - chunks.t.double())
            m = (1 - lam) * ps + lam * m
        forward = -(m * chunk + (1 - m) * torch.log1p(-ps)).sum()
        backward = -(ps * m.log() + (1 - ps) * torch.log1p(-m)).sum()
        expected = forward if isinstance(settings, Calm) else backward
    torch.testing.assert_close(sums.distillation.double(), expected, rtol=2e-6, atol=2e-6)


def test_each_sum_is_divided_by_its_own_count() -> None:
    hidden, head, targets, _ = problem(6, 12, 4)
    counts = Counts(torch.tensor(40.0), torch.tensor(8.0), torch.tensor(5.0))
    for settings, denominator in ((KL(), 8), (Calm(), 5), (NoDistillation(), 1)):
        sums = objective(hidden @ head.T, targets, settings, 0.0)
        expected = sums.denoise / 40 + 0.7 * sums.distillation / denominator
        torch.testing.assert_close(total(sums, counts, settings, 0.7), expected)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_slices_are_the_plain_loss_never_hold_all_logits_and_never_wait(kind: Any) -> None:
    for rows in (1, 7, 1000):
        hidden, head, targets, counts = problem(41, 53, 16)
        rest = (targets, LossSettings(kind, 1.3, counts, 0.4))
        expected = gradients(plain, hidden, head, *rest)
        for a, b in zip(gradients(fused_loss, hidden, head, *rest, rows), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))
    hidden, head, targets, counts = problem(512, 700, 8)
    with Watch() as seen:
        gradients(fused_loss, hidden, head, targets, LossSettings(kind, 1.0, counts, 0.5), 16)
    assert seen.largest == max(head.numel(), 16 * 700)
    assert seen.waits == set()


class Watch(TorchDispatchMode):
    """The largest tensor, in numbers, and operations after which the host waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.waits = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or name in ("_local_scalar_dense", "nonzero", "unique_consecutive"):
            self.waits.add(name)
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            self.largest = max(self.largest, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return out


@given(n=st.integers(0, 60), size=st.integers(1, 70), seed=st.integers(0, 99))
def test_slices_cover_every_row_and_chunk_once(n: int, size: int, seed: int) -> None:
    _, _, targets, _ = problem(n, 11, 4, seed)
    rows, likelihoods, tokens = [], [], []
    for part, own in slice_targets(targets, size):
        assert part.stop - part.start <= max(size, 4)
        assert own.gold.tolist() == targets.gold[part].tolist() and own.chunks is not None
        rows += range(part.start, part.stop)
        chunk_of = (own.chunks.chunk_of + len(likelihoods)).tolist()
        tokens += zip((own.chunks.rows + part.start).tolist(), chunk_of, strict=True)
        likelihoods += own.chunks.teacher_logp.tolist()
    assert rows == list(range(n)) and targets.chunks is not None
    assert likelihoods == targets.chunks.teacher_logp.tolist()
    assert tokens == [tuple(pair) for pair in targets.chunks.host.T.tolist()]


def test_no_positions_a_frozen_head_and_no_gradients_at_all() -> None:
    hidden, head, targets, counts = problem(0, 11, 4)
    none = LossSettings(KL(), 1.0, counts, 0.5)
    loss, _, grad_head = gradients(fused_loss, hidden, head, targets, none)
    assert loss == 0 and not grad_head.any()
    hidden, head, targets, counts = problem(9, 11, 4)
    settings = LossSettings(KL(), 1.0, counts, 0.5)
    fused_loss(hidden.requires_grad_(), head, targets, settings, 2)[0].backward()
    assert hidden.grad is not None
    with torch.no_grad():
        loss, sums = fused_loss(hidden, head, targets, settings, 2)
    torch.testing.assert_close(loss, plain(hidden, head, targets, settings).detach())
    assert not sums.denoise.requires_grad


def test_slices_are_sized_by_memory() -> None:
    assert (losses.slice_rows(151_936), losses.slice_rows(10**9, 1 << 30)) == (220, 32)
    for memory in (8 << 30, 24 << 30, 141 << 30):  # a sixth of the GPU, at most
        assert losses.slice_rows(151_936, memory) * 151_936 * 4 * 6 <= 0.16 * memory


def test_autocast_keeps_the_head_s_gradient_in_float32() -> None:
    hidden, head, targets, counts = problem(64, 301, 32)
    settings = LossSettings(KL(), 1.0, counts, 0.5)
    exact = gradients(plain, hidden, head, targets, settings)
    with torch.autocast("cpu", torch.bfloat16):
        half = gradients(fused_loss, hidden, head, targets, settings, 8)
    assert [x.dtype for x in half] == [torch.float32] * 3
    for a, b in zip(half, exact, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.02


def test_from_chats_to_the_gradient_of_full_logits(random_teacher: Path, tmp_path: Path) -> None:
    """Of a cache of all 4,096 logits, against the teacher's own at its masked positions."""
    out = tmp_path / "c"
    targets = {"k": 4096, "rank": 1, "pilot": 20, "values": "float32", "signals": ["topk"]}
    changes = {"noise": {"draws": 1}, "data": {"source": str(chats_file()), "limit": 3}}
    config = small_cache_config("tiny-shared", random_teacher, out, targets=targets, **changes)
    build_cache(config)
    plan = open_or_begin(config)
    work = prepare_unit(plan, Unit(0, 0), plan.data.between(0, 3))
    engine: Any = load_engine(plan)
    hidden = engine.hidden_states(work.requests)
    logits = iter(
        (hidden @ head_rows(plan.checkpoint, "llama").T).split(
            [len(request.read) for request in work.requests]
        )
    )
    teacher = []
    for item in work.items:
        whole = torch.zeros(item.view.positions.size, 4096)
        for rows in item.rows:
            whole[torch.from_numpy(rows)] = next(logits)
        teacher.append(whole)
    z, manifest = torch.cat(teacher).double(), load_manifest(out)
    batch = collate(rows_in(out, Unit(0, 0)), manifest)
    read = TargetReader(layout_of(out), 4096)(batch)
    torch.manual_seed(0)
    x = torch.randn(len(z), 4096, requires_grad=True)
    p, everything = torch.log_softmax(z / 2, 1), torch.ones(4096, dtype=torch.bool)
    for settings in (KL(2.0, Tidal()), ReverseKL(2.0)):
        value = objective(x, read, settings, 0.5).distillation
        (slope,) = torch.autograd.grad(value, x)
        tidal, part = settings.tidal, None
        if tidal is not None:
            part = strength_at(tidal, training_strength(tidal, 0.5), read.t)
        reverse = isinstance(settings, ReverseKL)
        expected, gradient = divergence_of(x, p, everything, 2.0, part, reverse)
        assert float(value.detach()) == pytest.approx(4 * float(expected), rel=1e-5)
        assert float((slope / 4 - gradient).norm() / gradient.norm()) < 1e-5


if __name__ == "__main__":
    run_slices_of_any_size(getattr(objectives, sys.argv[1])())
