"""Rows that join others under way: each gives what it gives alone, and nothing is run twice."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.using.decoding import Decoding, Row
from student_train.using.settings import SampleConfig
from student_train.using.student import sample_steps
from tests.student_train.using.test_sampler import ENDLESS, small

BLOCK = 4
WAYS: list[dict[str, Any]] = [
    {},
    {"steps_per_block": 1},
    {"threshold": 0.03},
    {"remasking": "random", "seed": 5},
    {"temperature": 1.0, "seed": 4, "top_k": 3, "top_p": 0.4},
    {"temperature": 1.3, "remasking": "random", "min_new_tokens": 3},
]
PROMPT = st.lists(st.integers(1, 20), min_size=1, max_size=11)
REQUESTS = st.lists(st.tuples(PROMPT, st.sampled_from(WAYS), st.integers(1, 4)), max_size=3)


@pytest.fixture(scope="module")
def model() -> Any:
    """In float64: what differs by rounding alone does not differ."""
    return small().double()


@settings(max_examples=40)
@given(arrivals=st.lists(REQUESTS, min_size=1, max_size=4), guidance=st.sampled_from([0.0, 0.8]))
def test_a_row_that_joins_gives_what_it_gives_alone(
    model: Any, arrivals: list[Any], guidance: float
) -> None:
    """Every block some come, with settings and lengths of their own; those that are done leave."""
    decoding = Decoding(model, ENDLESS, BLOCK, guidance)
    every: list[Row] = []
    rounds = 0
    while rounds < len(arrivals) or decoding.rows:
        rows = []
        for prompt, way, blocks in arrivals[rounds] if rounds < len(arrivals) else []:
            rows.append(Row(prompt, SampleConfig(BLOCK * blocks, block=BLOCK, **way)))
        every += rows
        if rows:
            decoding.join(rows)
        list(decoding.next_block(BLOCK))
        decoding.keep([len(row.made) < row.config.new_tokens for row in decoding.rows])
        rounds += 1
    for row in every:
        config = dataclasses.replace(row.config, guidance=guidance)
        *_, (tokens, _) = sample_steps(model, [row.prompt], ENDLESS, config)
        assert row.made == tokens[0].tolist()


def test_who_joins_costs_one_pass_and_padding_that_nobody_needs_is_given_up(model: Any) -> None:
    """One pass over a prompt but for its last block, which goes through with the first new one."""
    config = SampleConfig(new_tokens=12, block=BLOCK, steps_per_block=1)
    shapes: list[tuple[int, ...]] = []
    keys: list[int] = []
    embedding, layer = model.get_input_embeddings(), model.model.layers[0]
    hooks = [
        embedding.register_forward_hook(lambda _m, a, _o: shapes.append(tuple(a[0].shape))),
        layer.register_forward_pre_hook(
            lambda _m, _a, named: keys.append(named["attention_mask"].shape[-1]), with_kwargs=True
        ),
    ]
    decoding = Decoding(model, ENDLESS, BLOCK)
    decoding.join([Row([1] * 5, config)])
    list(decoding.next_block(BLOCK))
    decoding.join([Row([2] * 11, config), Row([3], config)])
    list(decoding.next_block(BLOCK))
    decoding.join([Row([4] * 3, config)])
    assert shapes == [(1, 8 + BLOCK), (2, 8), (3, BLOCK + BLOCK)]
    assert decoding.passes == 3
    decoding = Decoding(model, ENDLESS, BLOCK)  # of a server that always has work
    keys.clear()
    for _ in range(12):
        decoding.join([Row([1, 2, 3], config)])
        list(decoding.next_block(BLOCK))
        decoding.keep([len(row.made) < row.config.new_tokens for row in decoding.rows])
    for hook in hooks:
        hook.remove()
    assert len(keys) >= 12 and max(keys) <= 5 * BLOCK
