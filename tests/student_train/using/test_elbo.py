"""The bound on log-likelihoods against the mean over all orders of revealing, by whole passes."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.using.elbo import ElboConfig, log_likelihoods, masks
from tests.student_train.places import SPECIAL, small, whole_logits

CONTEXT = [1, 2, 3, 4, 5]
TOKENS = st.lists(st.integers(0, 46), min_size=1, max_size=11)


@pytest.fixture(scope="module")
def model() -> Any:
    return small()


def exact_bound(model: Any, context: list[int], tokens: list[int], size: int) -> float:
    """The mean over all orders of revealing each block, one whole pass a token: over the padded
    context, the finished blocks, and the block with masks.
    """
    total, width = 0.0, -(-len(context) // size) * size
    padding = width - len(context)
    for start in range(0, len(tokens), size):
        block = tokens[start : start + size]
        orders = list(itertools.permutations(range(len(block))))
        for order in orders:
            known = [SPECIAL.mask] * size
            for at in order:
                ids = [SPECIAL.pad] * padding + context + tokens[:start] + known
                logits = whole_logits(model, ids, padding, size)[width + start + at]
                total += float(logits.log_softmax(-1)[block[at]]) / len(orders)
                known[at] = block[at]
    return total


def test_a_block_of_one_is_the_chain_rule(model: Any) -> None:
    tokens, config = [[7, 8, 9], [6]], ElboConfig(draws=1, block=1)
    expected = [exact_bound(model, CONTEXT, t, 1) for t in tokens]
    scores = log_likelihoods(model, CONTEXT, tokens, SPECIAL, config)
    assert scores == pytest.approx(expected, abs=1e-5)


def test_the_mean_over_seeds_is_the_bound(model: Any) -> None:
    """Unbiased: the mean over many seeds is within three standard errors of it."""
    tokens, scores = [7, 8, 9, 10, 11], []
    for seed in range(400):
        config = ElboConfig(draws=16, block=4, seed=seed)
        scores += log_likelihoods(model, CONTEXT, [tokens], SPECIAL, config)
    error = float(torch.tensor(scores).std()) / math.sqrt(len(scores))
    mean = sum(scores) / len(scores)
    assert abs(mean - exact_bound(model, CONTEXT, tokens, 4)) < 3 * error < 0.09


@settings(max_examples=20)
@given(TOKENS, st.lists(TOKENS, min_size=1, max_size=4))
def test_answers_scored_together_and_in_several_passes_score_as_alone(
    model: Any, context: list[int], tokens: list[list[int]]
) -> None:
    config = ElboConfig(draws=3, block=4)
    together = log_likelihoods(model, context, tokens, SPECIAL, config)
    alone = [log_likelihoods(model, context, [t], SPECIAL, config)[0] for t in tokens]
    assert together == pytest.approx(alone, abs=2e-5)
    assert all(value < 0 for value in together)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("student_train.using.elbo._TOKENS_PER_PASS", 8)
        passes = log_likelihoods(model, context, tokens, SPECIAL, config)
    assert passes == pytest.approx(alone, abs=2e-5)


@settings(max_examples=50)
@given(length=st.integers(1, 32), draws=st.integers(1, 64), seed=st.integers(0, 99))
def test_masks_are_fixed_and_weigh_each_count_alike(length: int, draws: int, seed: int) -> None:
    config, index = ElboConfig(draws=draws, seed=seed), seed % 10
    sets = masks(length, index, config)
    for (a, v), (b, w) in zip(sets, masks(length, index, config), strict=True):
        assert torch.equal(a, b) and v == w
    assert len(sets) == (1 if length == 1 else draws)
    counts = [int(mask.sum()) for mask, _ in sets]
    assert all(1 <= count <= length for count in counts)
    weighted = sum(weight * int(mask.sum()) for mask, weight in sets)
    assert weighted == pytest.approx(length)
    if length > 1 and draws % length == 0:  # stratified: each count equally often, to one
        assert all(abs(counts.count(n) - draws // length) <= 1 for n in range(1, length + 1))


def test_nothing_to_score_is_refused(model: Any) -> None:
    for context, tokens in (([], [[1]]), ([1], [[1], []])):
        with pytest.raises(ValueError):  # noqa: PT011
            log_likelihoods(model, context, tokens, SPECIAL, ElboConfig())
