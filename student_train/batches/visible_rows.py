"""Which rows of [x_t1 ; … ; x_tm ; x_0] a batch needs: the loss reads masked positions alone, and most of the rest
feeds none. Mostly m is 1; with more, several draws of an example share the x_0 that all of them have.

A block of x_t sees itself and the earlier blocks of x_0. So x_t is needed where a block holds a masked position (never
the prompt's), and x_0 before the last of those. The rest is left out, which changes no value that is read.
"""

from __future__ import annotations

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
    """Places in [x_t1 ; … ; x_tm ; x_0] that must be run, and where among them each masked position stands.

    `masked`: each example's masked positions, rising, draw by draw; m is the most draws that an example has. With n the
    longest length, position i of x_tj is place (j − 1)·n + i, x_0's is place m·n + i. Rows are padded with −1 to the
    longest of them.
    """
    width, copies = max(lengths), max(len(draws) for draws in masked)
    kept = [
        _places(draws, length, width, copies, block)
        for draws, length in zip(masked, lengths, strict=True)
    ]
    places = np.full((len(kept), max(1, *(len(k) for k in kept))), -1, np.int64)
    for row, mine in zip(places, kept, strict=True):
        row[: len(mine)] = mine
    column = [
        np.searchsorted(mine, one + j * width)
        for mine, draws in zip(kept, masked, strict=True)
        for j, one in enumerate(draws)
    ]
    return torch.from_numpy(places), torch.from_numpy(np.concatenate(column).astype(np.int64))


def _places(
    draws: Sequence[Masked], length: int, width: int, copies: int, block: int
) -> Int[np.ndarray, " _"]:
    kept, last = [], 0
    for j, masked in enumerate(draws):
        if masked.size:
            blocks = np.unique(masked // block)
            noised = (blocks[:, None] * block + np.arange(block)).reshape(-1)
            kept.append(j * width + noised[noised < length])
            last = max(last, int(blocks[-1]))
    clean = np.arange(last * block)
    return np.concatenate([*kept, copies * width + clean]).astype(np.int64)
