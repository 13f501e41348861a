"""Rows that join others under way: each gives what it gives alone, whatever the others do, and
nothing is run twice.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.using.decoding import Decoding, Row
from student_train.using.settings import SampleConfig
from student_train.using.student import sample_steps
from tests.student_train.using.test_sampler import SPECIAL, small

BLOCK = 4
ENDLESS = dataclasses.replace(SPECIAL, eos=-1)
WAYS: list[dict[str, Any]] = [
    {},
    {"steps_per_block": 2},
    {"threshold": 0.03},
    {"temperature": 0.7, "seed": 3},
    {"remasking": "random", "seed": 5},
    {"temperature": 1.0, "seed": 4, "top_k": 3},
    {"temperature": 2.0, "top_p": 0.4},
    {"temperature": 1.3, "remasking": "random", "min_new_tokens": 3},
]

request = st.tuples(
    st.lists(st.integers(1, 20), min_size=1, max_size=11),
    st.integers(0, len(WAYS) - 1),
    st.integers(1, 4),
)


@pytest.fixture(scope="module")
def model() -> Any:
    """In float64: what differs by rounding alone does not differ."""
    return small().double()


def alone(model: Any, row: Row, guidance: float) -> list[int]:
    *_, (tokens, _) = sample_steps(
        model, [row.prompt], ENDLESS, dataclasses.replace(row.config, guidance=guidance)
    )
    return tokens[0].tolist()


@settings(max_examples=40, deadline=None)
@given(
    arrivals=st.lists(st.lists(request, min_size=0, max_size=3), min_size=1, max_size=4),
    guidance=st.sampled_from([0.0, 0.8]),
)
def test_a_row_that_joins_gives_what_it_gives_alone(
    model: Any, arrivals: list[Any], guidance: float
) -> None:
    """Every block some rows come, with settings and lengths of their own, and those that are done
    leave.
    """
    decoding = Decoding(model, ENDLESS, BLOCK, guidance)
    every: list[Row] = []
    rounds = 0
    while rounds < len(arrivals) or decoding.rows:
        coming = arrivals[rounds] if rounds < len(arrivals) else []
        rows = [
            Row(p, SampleConfig(new_tokens=BLOCK * n, block=BLOCK, **WAYS[way]))
            for p, way, n in coming
        ]
        every += rows
        if rows:
            decoding.join(rows)
        for _ in decoding.next_block(BLOCK):
            pass
        decoding.keep([len(row.made) < row.config.new_tokens for row in decoding.rows])
        rounds += 1
    for row in every:
        assert row.made == alone(model, row, guidance)


def test_who_joins_costs_one_pass_over_a_prompt_but_for_its_last_block(model: Any) -> None:
    """Its last block goes through with the first new block; where a prompt is one block, nothing is
    run to join.
    """
    decoding = Decoding(model, ENDLESS, BLOCK)
    config = SampleConfig(new_tokens=8, block=BLOCK, steps_per_block=1)
    shapes: list[tuple[int, ...]] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _m, args, _o: shapes.append(tuple(args[0].shape))
    )
    decoding.join([Row([1] * 5, config)])
    list(decoding.next_block(BLOCK))
    decoding.join([Row([2] * 11, config), Row([3], config)])
    list(decoding.next_block(BLOCK))
    decoding.join([Row([4] * 3, config)])
    hook.remove()
    assert shapes == [(1, 8 + BLOCK), (2, 8), (3, BLOCK + BLOCK)]
    assert decoding.passes == 3


def test_padding_that_nobody_needs_is_given_up(model: Any) -> None:
    """Else the slots of a server that always has work grow for ever."""
    decoding = Decoding(model, ENDLESS, BLOCK)
    keys: list[int] = []
    first_layer = model.model.layers[0]
    hook = first_layer.register_forward_pre_hook(
        lambda _m, _a, named: keys.append(named["attention_mask"].shape[-1]), with_kwargs=True
    )
    for _ in range(12):
        decoding.join([Row([1, 2, 3], SampleConfig(new_tokens=12, block=BLOCK, steps_per_block=1))])
        list(decoding.next_block(BLOCK))
        decoding.keep([len(row.made) < row.config.new_tokens for row in decoding.rows])
    hook.remove()
    assert len(keys) >= 12 and max(keys) <= 5 * BLOCK


def test_the_way_of_one_row_is_not_that_of_another(model: Any) -> None:
    """A greedy row beside a warm one draws no noise; steps are a row's own."""
    slow, fast = (
        SampleConfig(new_tokens=4, block=BLOCK),
        SampleConfig(new_tokens=4, block=BLOCK, steps_per_block=1),
    )
    decoding = Decoding(model, ENDLESS, BLOCK)
    decoding.join([Row([1, 2], slow), Row([1, 2], fast)])
    masked = [(state == ENDLESS.mask).sum(dim=1).tolist() for state in decoding.next_block(BLOCK)]
    assert masked == [[3, 0], [2, 0], [1, 0], [0, 0], [0, 0]]
    assert torch.equal(
        torch.tensor(decoding.rows[0].made), torch.tensor(alone(model, decoding.rows[0], 0.0))
    )
