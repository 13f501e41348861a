from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.batches.collate import places_of_draws
from student_train.model import masked_hidden
from tests.student_train.model.test_student import small
from tests.student_train.places import all_places, in_float64


@st.composite
def batches(draw: Any) -> tuple[list[int], list[list[np.ndarray]], int]:
    """Lengths of examples, the masked positions of each one's draws, a block."""
    lengths = draw(st.lists(st.integers(1, 24), min_size=1, max_size=3))
    masked = []
    for n in lengths:
        sets = draw(st.lists(st.sets(st.integers(0, n - 1)), min_size=1, max_size=4))
        masked.append([np.array(sorted(positions), np.int64) for positions in sets])
    return lengths, masked, draw(st.integers(1, 9))


@given(batches())
def test_masked_positions_stand_where_it_says_and_nothing_is_there_twice(batch: Any) -> None:
    lengths, masked, block = batch
    masked = [draws[0] for draws in masked]
    places, column = places_of_draws([[m] for m in masked], lengths, block)
    row = np.repeat(np.arange(len(masked)), [m.size for m in masked])
    assert places[row, column].tolist() == np.concatenate(masked).tolist()
    for mine, length, m in zip(places.numpy(), lengths, masked, strict=True):
        kept = mine[mine >= 0]
        assert len(set(kept.tolist())) == len(kept) and (kept % max(lengths) < length).all()
        last = m.max(initial=0) // block * block
        assert (kept[kept >= max(lengths)] - max(lengths)).tolist() == list(range(last))


@settings(max_examples=25)
@given(batches(), st.integers(0, 2**31))
def test_states_and_gradients_are_those_of_each_draw_alone_over_all_rows(
    batch: Any, seed: int
) -> None:
    lengths, masked, block = batch
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(0, 49, (len(lengths), max(lengths)), generator=generator)
    model = in_float64(small())

    def run(clean: torch.Tensor, masked: Any, lengths: list[int], whole: bool) -> torch.Tensor:
        width, copies = clean.shape[1], max(map(len, masked))
        row, column = [], []
        for i, draws in enumerate(masked):
            for j, positions in enumerate(draws):
                row += [i] * positions.size
                column += (positions + j * width).tolist()
        row, column = torch.tensor(row).long(), torch.tensor(column).long()
        noised = clean.repeat(1, copies)
        noised[row, column] = 49
        places, place = places_of_draws(masked, lengths, block)
        if whole:
            places, place = all_places(lengths), column
        return masked_hidden(model, noised, clean, places, row, place, block)

    def gradients(hidden: torch.Tensor) -> list[torch.Tensor]:
        weights = torch.linspace(-1, 1, hidden.numel()).double().reshape(hidden.shape)
        parameters = list(model.model.parameters())
        loss = (hidden * weights).sum()
        how = {"allow_unused": True, "materialize_grads": True}
        return list(torch.autograd.grad(loss, parameters, **how))  # type: ignore

    together = run(clean, masked, lengths, False)
    alone = []
    for i, n in enumerate(lengths):
        alone += [run(clean[i : i + 1, :n], [[one]], [n], True) for one in masked[i]]
    alone = torch.cat(alone)
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(together), gradients(alone), rtol=1e-9, atol=1e-9)


def test_the_prompt_the_last_block_and_an_example_without_masks_are_left_out() -> None:
    places, _ = places_of_draws([[np.array([33, 70])]], [96], 32)
    assert places.tolist() == [[*range(32, 96), *range(96, 96 + 64)]]
    places, column = places_of_draws([[np.zeros(0, np.int64)]], [40], 8)
    assert places.tolist() == [[-1]] and column.numel() == 0
