"""Which rows of [x_t1 ; … ; x_tm ; x_0] a batch needs.

The loss reads masked positions alone. A block of x_t sees itself and the earlier blocks of x_0, so
x_t is needed where a block holds a masked position (never the prompt's), and x_0 before the last of
those. The rest is left out, which changes no value that is read. Mostly m is 1; with more, several
draws of an example share the x_0 that all of them have.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

Masked = Int[np.ndarray, " _"]


def needed_places(
    masked: Sequence[Masked], lengths: Sequence[int], block: int
) -> tuple[Int[Tensor, "batch rows"], Int[Tensor, " n"]]:
    """`places_of_draws` where each example has one draw."""
    return places_of_draws([[one] for one in masked], lengths, block)


def places_of_draws(
    masked: Sequence[Sequence[Masked]], lengths: Sequence[int], block: int
) -> tuple[Int[Tensor, "batch rows"], Int[Tensor, " n"]]:
    """Places that must be run, and where among them each masked position stands.

    `masked`: each example's masked positions, rising, draw by draw; m is the most draws that an
    example has. With n the longest length, position i of x_tj is place (j − 1)·n + i, x_0's is
    place m·n + i. Rows are padded with −1 to the longest of them.
    """
    width, copies = max(lengths), max(len(draws) for draws in masked)
    needed, columns = [], []
    for draws, length in zip(masked, lengths, strict=True):
        # 1. Of each x_t the blocks with a masked position, cut at the example's end.
        parts, last = [], 0
        for j, positions in enumerate(draws):
            blocks = np.unique(positions // block)
            noised = (blocks[:, None] * block + np.arange(block)).reshape(-1)
            parts.append(j * width + noised[noised < length])
            last = max(last, int(blocks.max(initial=0)))
        # 2. Of x_0 all blocks before the last of these.
        mine = np.concatenate([*parts, copies * width + np.arange(last * block)])
        needed.append(mine)
        # 3. Places rise, so each masked position is found among them.
        columns += [np.searchsorted(mine, one + j * width) for j, one in enumerate(draws)]
    places = np.full((len(needed), max(1, *(len(mine) for mine in needed))), -1, np.int64)
    for row, mine in zip(places, needed, strict=True):
        row[: len(mine)] = mine
    return torch.from_numpy(places), torch.from_numpy(np.concatenate(columns).astype(np.int64))
