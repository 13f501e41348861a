from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.batches.visible_rows import needed_places, places_of_draws
from student_train.model.student import masked_hidden
from tests.student_train.model.test_student import small
from tests.student_train.places import all_places, in_float64


@st.composite
def batches(draw: Any) -> tuple[list[int], list[np.ndarray], int]:
    lengths = draw(st.lists(st.integers(1, 24), min_size=1, max_size=4))
    masked = [np.array(sorted(draw(st.sets(st.integers(0, n - 1)))), np.int64) for n in lengths]
    return lengths, masked, draw(st.integers(1, 9))


@given(batches())
def test_masked_positions_stand_where_it_says_and_nothing_is_there_twice(batch: Any) -> None:
    lengths, masked, block = batch
    places, column = needed_places(masked, lengths, block)
    row = np.repeat(np.arange(len(masked)), [m.size for m in masked])
    assert places[row, column].tolist() == np.concatenate(masked).tolist()
    for mine, length, m in zip(places.numpy(), lengths, masked, strict=True):
        kept = mine[mine >= 0]
        assert len(set(kept.tolist())) == len(kept) and (kept % max(lengths) < length).all()
        last = m.max(initial=-1) // block * block
        assert (kept[kept >= max(lengths)] - max(lengths)).tolist() == list(range(max(last, 0)))


@settings(max_examples=25)
@given(batches(), st.integers(0, 2**31))
def test_hidden_states_and_gradients_are_those_of_all_rows(batch: Any, seed: int) -> None:
    lengths, masked, block = batch
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(0, 49, (len(lengths), max(lengths)), generator=generator)
    row = torch.from_numpy(np.repeat(np.arange(len(masked)), [m.size for m in masked]))
    column = torch.from_numpy(np.concatenate(masked))
    noised = clean.clone()
    noised[row, column] = 49
    model = small().double()
    found = []
    for places, where in (needed_places(masked, lengths, block), (all_places(lengths), column)):
        model.zero_grad()
        hidden = masked_hidden(model, noised, clean, places, row, where, block)
        (
            hidden * torch.linspace(-1, 1, hidden.numel()).double().reshape(hidden.shape)
        ).sum().backward()
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()
        ]
        found.append((hidden.detach(), gradients))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=1e-10)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@st.composite
def draws_of(draw: Any) -> tuple[list[int], list[list[np.ndarray]], int]:
    lengths = draw(st.lists(st.integers(1, 24), min_size=1, max_size=3))
    masked = [
        [
            np.array(sorted(draw(st.sets(st.integers(0, n - 1)))), np.int64)
            for _ in range(draw(st.integers(1, 4)))
        ]
        for n in lengths
    ]
    return lengths, masked, draw(st.integers(1, 9))


@settings(max_examples=25)
@given(draws_of(), st.integers(0, 2**31))
def test_draws_over_one_clean_copy_have_the_states_and_gradients_of_each_alone(
    batch: Any, seed: int
) -> None:
    lengths, masked, block = batch
    generator = torch.Generator().manual_seed(seed)
    width, copies = max(lengths), max(map(len, masked))
    clean = torch.randint(0, 49, (len(lengths), width), generator=generator)
    model = in_float64(small())

    def run(
        clean: torch.Tensor, masked: list[list[np.ndarray]], lengths: list[int], copies: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = clean.shape[1]
        flat = [(i, j, m) for i, draws in enumerate(masked) for j, m in enumerate(draws)]
        row = torch.from_numpy(
            np.repeat([i for i, _, _ in flat], [m.size for _, _, m in flat])
        ).long()
        column = torch.from_numpy(np.concatenate([m + j * width for _, j, m in flat])).long()
        noised = clean.repeat(1, copies)
        noised[row, column] = 49
        places, where = places_of_draws(masked, lengths, block)
        return masked_hidden(model, noised, clean, places, row, where, block), places

    def gradients() -> list[torch.Tensor]:
        found = [
            torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()
        ]
        model.zero_grad()
        return found

    shared, places = run(clean, masked, lengths, copies)
    (shared * torch.linspace(-1, 1, shared.numel()).double().reshape(shared.shape)).sum().backward()
    together, rows = gradients(), int((places >= 0).sum())
    alone, alone_rows = [], 0
    for i, draws in enumerate(masked):
        for one in draws:
            hidden, own = run(clean[i : i + 1, : lengths[i]], [[one]], [lengths[i]], 1)
            alone.append(hidden)
            alone_rows += int((own >= 0).sum())
    apart = torch.cat(alone)
    (apart * torch.linspace(-1, 1, apart.numel()).double().reshape(apart.shape)).sum().backward()
    torch.testing.assert_close(shared, apart, rtol=1e-10, atol=1e-10)
    for a, b in zip(together, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert rows <= alone_rows


def test_the_prompt_and_the_last_block_are_left_out() -> None:
    places, _ = needed_places(
        [np.array([33, 70])], [96], 32
    )  # a prompt of one block, two masked positions
    assert places.tolist() == [[*range(32, 96), *range(96, 96 + 64)]]


@pytest.mark.parametrize("length", [1, 40])
def test_without_a_masked_position_one_row_of_padding_is_left(length: int) -> None:
    places, column = needed_places([np.zeros(0, np.int64)], [length], 8)
    assert places.tolist() == [[-1]] and column.numel() == 0
