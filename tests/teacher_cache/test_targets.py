from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import TideError
from teacher_cache.targets import Scores, TargetSpec, extract, refuse_nonfinite


@given(st.integers(0, 999), st.integers(1, 20), st.sampled_from([0.5, 0.9, 1.0]))
def test_against_float64(seed: int, k: int, mass: float) -> None:
    torch.manual_seed(seed)
    logits, gold = torch.randn(5, 20) * 4, torch.randint(0, 20, (5,))
    spec = TargetSpec(k, mass, (1.0, 3.0))
    gold_logit, lse, sizes, ids, values = extract(logits, gold, spec)
    exact = logits.double()
    assert torch.equal(gold_logit, logits[torch.arange(5), gold])
    for column, temperature in enumerate(spec.temperatures):
        torch.testing.assert_close(
            lse[:, column].double(), torch.logsumexp(exact / temperature, 1), rtol=1e-6, atol=1e-6
        )
    for i in range(5):
        order = torch.argsort(exact[i], descending=True)
        assert torch.equal(values[i].double(), exact[i][order[:k]])
        assert torch.equal(exact[i][ids[i]], exact[i][order[:k]])
        reached = torch.softmax(exact[i] / 3.0, 0)[order[:k]].cumsum(0)
        n = int(sizes[i])
        if mass == 1.0:
            assert n == k
        else:
            assert n == k or reached[n - 1] >= mass - 1e-6
            assert n == 1 or reached[n - 2] < mass + 1e-6


def test_bfloat16_logits_are_widened_before_exp() -> None:
    logits = (torch.randn(3, 4096) * 5).bfloat16()
    _, lse, *_ = extract(logits, torch.zeros(3, dtype=torch.long), TargetSpec(4, 1.0, (1.0,)))
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse[:, 0].double(), torch.logsumexp(logits.double(), 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_teachers_are_refused(bad: float) -> None:
    good = np.zeros(3, np.float32)
    broken = np.array([0, bad, 0], np.float32)
    lse, top = np.zeros((3, 2), np.float32), np.zeros((3, 4), np.float32)
    sizes, ids = np.full(3, 4, np.int32), np.zeros((3, 4), np.int32)
    refuse_nonfinite(Scores(good, lse, sizes, ids, top), "fine")
    for scores in (
        Scores(broken, lse, None, None, None),
        Scores(good, lse + broken[:, None], None, None, None),
        Scores(good, lse, sizes, ids, top + broken[:, None]),
    ):
        with pytest.raises(TideError, match="1 non-finite rows of 3 for example e7"):
            refuse_nonfinite(scores, "e7")
