from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.using.elbo import ElboConfig, log_likelihoods, masks
from student_train.using.settings import Special
from tests.student_train.model.test_student import small

SPECIAL = Special(mask=49, pad=47, eos=48)
CONTEXT = [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def model() -> Any:
    return small()


def log_p(
    model: Any, context: list[int], done: list[int], block: list[int], at: int, size: int
) -> float:
    """log p(gold) at one position by a whole pass: padded context, finished blocks, the block with
    masks.
    """
    width = -(-len(context) // size) * size
    ids = (
        [SPECIAL.pad] * (width - len(context))
        + context
        + done
        + block
        + [SPECIAL.mask] * (size - len(block))
    )
    index = torch.arange(len(ids)) // size
    seen = (index[:, None] >= index[None]) & (torch.arange(len(ids)) >= width - len(context))[None]
    seen |= torch.eye(len(ids), dtype=torch.bool)
    with torch.no_grad():
        hidden = model.model(
            input_ids=torch.tensor([ids]), attention_mask=seen[None, None], use_cache=False
        )
        logits = model.lm_head(hidden.last_hidden_state)[0].double()
    return float(logits[width + len(done) + at].log_softmax(-1)[log_p.gold])  # type: ignore[attr-defined]


def exact_bound(model: Any, context: list[int], tokens: list[int], size: int) -> float:
    """The mean over all orders of revealing each block, one whole pass a token."""
    total = 0.0
    for start in range(0, len(tokens), size):
        block = tokens[start : start + size]
        orders = list(itertools.permutations(range(len(block))))
        for order in orders:
            known = [SPECIAL.mask] * len(block)
            for at in order:
                log_p.gold = block[at]  # type: ignore[attr-defined]
                total += log_p(model, context, tokens[:start], known, at, size) / len(orders)
                known[at] = block[at]
    return total


def test_a_block_of_one_is_the_chain_rule(model: Any) -> None:
    found = log_likelihoods(model, CONTEXT, [[7, 8, 9], [6]], SPECIAL, ElboConfig(draws=1, block=1))
    assert found == pytest.approx(
        [exact_bound(model, CONTEXT, t, 1) for t in ([7, 8, 9], [6])], abs=1e-5
    )


def test_the_mean_over_seeds_is_the_bound(model: Any) -> None:
    """Unbiased: with many seeds the estimate comes to the mean over all orders, within three
    standard errors.
    """
    tokens = [7, 8, 9, 10, 11]
    wanted = exact_bound(model, CONTEXT, tokens, 4)
    config = [ElboConfig(draws=16, block=4, seed=seed) for seed in range(400)]
    found = torch.tensor([log_likelihoods(model, CONTEXT, [tokens], SPECIAL, c)[0] for c in config])
    error = float(found.std()) / math.sqrt(len(found))
    assert abs(float(found.mean()) - wanted) < 3 * error
    assert error < 0.03


@settings(max_examples=20, deadline=None)
@given(
    context=st.lists(st.integers(0, 46), min_size=1, max_size=9),
    tokens=st.lists(st.lists(st.integers(0, 46), min_size=1, max_size=11), min_size=1, max_size=4),
)
def test_answers_scored_together_score_as_alone(
    model: Any, context: list[int], tokens: list[list[int]]
) -> None:
    config = ElboConfig(draws=3, block=4)
    together = log_likelihoods(model, context, tokens, SPECIAL, config)
    alone = [log_likelihoods(model, context, [t], SPECIAL, config)[0] for t in tokens]
    assert together == pytest.approx(alone, abs=2e-5)
    assert all(value < 0 for value in together)


def test_many_copies_go_through_in_several_passes(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ElboConfig(draws=5, block=4)
    whole = log_likelihoods(model, CONTEXT, [[7, 8, 9, 10, 11, 12]], SPECIAL, config)
    monkeypatch.setattr("student_train.using.elbo._TOKENS_PER_PASS", 8)
    monkeypatch.setattr("student_train.using.elbo._LOGITS_PER_SLICE", 1)
    assert log_likelihoods(
        model, CONTEXT, [[7, 8, 9, 10, 11, 12]], SPECIAL, config
    ) == pytest.approx(whole, abs=1e-5)


@settings(max_examples=50)
@given(
    length=st.integers(1, 32),
    draws=st.integers(1, 64),
    seed=st.integers(0, 99),
    index=st.integers(0, 9),
)
def test_masks_are_fixed_and_weigh_each_count_alike(
    length: int, draws: int, seed: int, index: int
) -> None:
    config = ElboConfig(draws=draws, seed=seed)
    found = masks(length, index, config)
    again = masks(length, index, config)
    assert all(torch.equal(a, b) and v == w for (a, v), (b, w) in zip(found, again, strict=True))
    assert len(found) == (1 if length == 1 else draws)
    counts = [int(mask.sum()) for mask, _ in found]
    assert all(1 <= count <= length for count in counts)
    assert sum(
        weight * count for (_, weight), count in zip(found, counts, strict=True)
    ) == pytest.approx(length)
    if length > 1 and draws % length == 0:  # stratified: each count equally often, to one
        assert all(abs(counts.count(n) - draws // length) <= 1 for n in range(1, length + 1))


def test_nothing_to_score_is_refused(model: Any) -> None:
    for context, tokens in (([], [[1]]), ([1], [[]]), ([1], [[1], []])):
        with pytest.raises(ValueError):  # noqa: PT011
            log_likelihoods(model, context, tokens, SPECIAL, ElboConfig())
