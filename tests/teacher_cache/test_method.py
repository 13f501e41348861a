"""What the teacher sees, and what is kept of its logits, against float64."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.aligned.examples import Prepared
from shared.settings.config import NoiseConfig
from shared.system.files import TideError
from teacher_cache.method import (
    Scores,
    TailEncoder,
    TargetSpec,
    draw_for,
    extract,
    outside_of,
    passes,
    refuse_nonfinite,
    teacher_view,
)
from tests.reading import random_tables

MASK = 999


def example(cross: bool) -> Prepared:
    ids, spans = np.arange(10, dtype=np.int32), np.array([[2, 10]], np.int32)
    teacher_ids = np.arange(100, 112, dtype=np.int32) if cross else None
    chunks = np.array([[3, 5, 2, 3], [5, 6, 3, 6], [6, 9, 6, 8]], np.int32)[: 3 * cross]
    return Prepared("e", ids, spans, teacher_ids, chunks, not cross, np.zeros(1, np.int32))


@given(st.booleans(), st.booleans(), st.integers(0, 300), st.sampled_from([0.0, 0.5, 1.0]))
def test_every_masked_position_is_read_once_and_masked_when_read(
    cross: bool, comp_demo: bool, seed: int, ratio: float
) -> None:
    item = example(cross)
    noise = NoiseConfig(seed=seed, comp_demo=comp_demo, demo_ratio=ratio)
    draw = draw_for(item, noise, 0)
    view = teacher_view(item, draw)
    pairs = passes(view, MASK, comp_demo)
    order = [int(row) for _, rows in pairs for row in rows]
    assert sorted(order) == list(range(view.positions.size))
    for request, rows in pairs:
        assert request.read.size > 0  # a pass with nothing to read is not run
        assert (request.ids[request.read] == MASK).all()
        assert np.array_equal(request.gold, view.ids[request.read])
        assert np.array_equal(request.read, view.positions[rows])
        elsewhere = np.setdiff1d(np.arange(len(request.ids)), request.read)
        assert np.array_equal(request.ids[elsewhere], view.ids[elsewhere])  # the rest is revealed
    assert len(pairs) <= (2 if comp_demo and ratio == 0.5 else 1)
    if len(pairs) == 2:  # pass one reads B and reveals A
        assert np.array_equal(pairs[0][0].read, view.positions[~view.in_a])
    assert (view.ids != MASK).all()  # the example itself is untouched
    if cross:  # chunks are never split between the passes
        for chunk, part in enumerate(draw.split):
            assert (view.in_a[view.chunk_of == chunk] == part).all()
        places = [i for a, b in item.chunks[draw.chunks, :2] for i in range(a, b)]
        assert view.positions.tolist() == places


def test_nothing_masked_no_pass() -> None:
    for cross in (True, False):
        item = example(cross)
        nothing: Any = {n: getattr(item, n)[:0] for n in ("spans", "chunks", "offsets")}
        empty = dataclasses.replace(item, student_ids=item.student_ids[:2], **nothing)
        view = teacher_view(empty, draw_for(empty, NoiseConfig(), 0))
        assert passes(view, MASK, True) == passes(view, MASK, False) == []


def close(value: torch.Tensor, exact: torch.Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(value.double(), exact, rtol=rtol, atol=atol)


@given(st.integers(0, 999), st.integers(1, 20), st.sampled_from([0.5, 0.9, 1.0]), st.integers(0, 3))
def test_against_float64(seed: int, k: int, mass: float, unshared: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(5, 20) * 4
    excluded = torch.randperm(20)[:unshared]
    allowed = torch.ones(20, dtype=torch.bool)
    allowed[excluded] = False
    k = min(k, 20 - unshared)
    gold = torch.arange(20)[allowed][torch.randint(0, 20 - unshared, (5,))]
    hidden, spec = torch.randn(5, 6), TargetSpec(k, mass, (1.0, 3.0), 4)
    tables = dataclasses.replace(random_tables(20, 6, 4), shared=allowed.numpy())
    encoder = TailEncoder(tables, spec.temperatures)
    found = extract(logits, hidden, gold, spec, excluded, encoder)
    exact, whole = logits.double(), torch.from_numpy(tables.encoder).double()
    coefficients = (hidden.double() - torch.from_numpy(tables.center)) @ whole.T
    code = (coefficients / tables.step).clamp(-127, 127)
    assert (found["tail_code"] - code).abs().max() <= 0.5 + 1e-4
    directions = torch.from_numpy(tables.directions * tables.scales.astype(np.float64))
    x = torch.from_numpy(tables.mean) + found["tail_code"].double() * tables.step @ directions.T
    # The gold token's likelihood is over all logits, everything else over the shared ones.
    close(found["gold_logp"], torch.log_softmax(exact, 1)[torch.arange(5), gold], 1e-5, 1e-5)
    exact = exact.masked_fill(~allowed, -torch.inf)
    close(found["logsumexp"], torch.logsumexp(exact, 1), 1e-6, 1e-6)
    for i in range(5):
        order = torch.argsort(exact[i], descending=True)
        assert torch.equal(exact[i][found["topk_ids"][i]], exact[i][order[:k]])
        close(found["topk_logp"][i], torch.log_softmax(exact, 1)[i][order[:k]], 1e-5, 1e-5)
        reached = torch.softmax(exact[i] / 3.0, 0)[order[:k]].cumsum(0)
        n = int(found["topk_sizes"][i])
        assert n == k if mass == 1.0 else n == k or reached[n - 1] >= mass - 1e-6
        assert mass == 1.0 or n == 1 or reached[n - 2] < mass + 1e-6
        for j, temperature in enumerate(spec.temperatures):
            outside = allowed.clone()
            outside[order[:n]] = False
            if outside.any():  # exp(x_T + level) sums to what the teacher has there
                own = x[i] / temperature + torch.from_numpy(tables.calibration[j])
                sums = (torch.logsumexp(v[outside], 0) for v in (exact[i] / temperature, own))
                tail, linear = sums
                level = tail - torch.logsumexp(exact[i], 0) / temperature - linear
                close(found["tail_level"][i, j], level, 1e-4, 1e-4)


def test_what_is_outside_is_exact_where_nearly_all_is_inside() -> None:
    """1 − Σp of rounded values has no digit left here; the sum of what is outside has them all."""
    logp = torch.log_softmax(torch.tensor([[30.0, 0.0, -1.0, -2.0]]), 1)
    exact = torch.logsumexp(logp[:, 1:].double(), 1)
    _, tails = outside_of(logp, torch.tensor([[0]]), torch.tensor([1]), [1.0])
    close(tails[:, 0], exact, 1e-6, 1e-6)


def test_bfloat16_logits_are_widened_before_exp() -> None:
    logits = (torch.randn(3, 4096) * 5).bfloat16()
    found = extract(logits, logits, torch.zeros(3, dtype=torch.long), TargetSpec(4, 1.0, (1.0,)))
    assert found["logsumexp"].dtype == torch.float32
    close(found["logsumexp"], torch.logsumexp(logits.double(), 1), 1e-6, 1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_teacher_that_overflows_is_noticed(bad: float) -> None:
    logits, gold = torch.zeros(2, 9), torch.zeros(2, dtype=torch.long)
    spec, encoder = (
        TargetSpec(3, 1.0, (1.0, 2.0), 2),
        TailEncoder(random_tables(9, 4, 2), (1.0, 2.0)),
    )

    def scores() -> Scores:
        found = extract(logits, torch.zeros(2, 4), gold, spec, None, encoder)
        return {name: values.numpy() for name, values in found.items()}

    good = scores()
    refuse_nonfinite(good, "fine")
    logits[1, 4] = bad
    broken = [scores()]
    for name, values in good.items():
        if name not in ("topk_sizes", "topk_ids"):
            broken.append({**good, name: values.copy()})
            broken[-1][name][1] = bad
    for one in broken:
        with pytest.raises(TideError, match="e7"):
            refuse_nonfinite(one, "e7")
