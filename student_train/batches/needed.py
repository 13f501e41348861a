"""Which rows of [x_t ; x_0] a batch needs: the loss reads masked positions alone, and most of the rest feeds none.

A block of x_t sees itself and the earlier blocks of x_0. So x_t is needed where a block holds a masked position (never
the prompt's), and x_0 before the last of those. The rest is left out, which changes no value that is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def needed_places(
    masked: Sequence[Int[np.ndarray, " _"]], lengths: Sequence[int], block: int
) -> tuple[Int[Tensor, "batch rows"], Int[Tensor, " n"]]:
    """Places in [x_t ; x_0] that must be run, and where among them each masked position stands.

    `masked`: each example's masked positions, rising. x_t's position i is place i, x_0's is place i + the longest
    length. Rows are padded with −1 to the longest of them.
    """
    width = max(lengths)
    kept = [_places(m, n, width, block) for m, n in zip(masked, lengths, strict=True)]
    places = np.full((len(kept), max(1, *(len(k) for k in kept))), -1, np.int64)
    for row, mine in zip(places, kept, strict=True):
        row[: len(mine)] = mine
    column = [np.searchsorted(mine, m) for mine, m in zip(kept, masked, strict=True)]
    return torch.from_numpy(places), torch.from_numpy(np.concatenate(column).astype(np.int64))


def _places(masked: Int[np.ndarray, " _"], length: int, width: int, block: int) -> Int[np.ndarray, " _"]:
    if not masked.size:
        return np.zeros(0, np.int64)
    blocks = np.unique(masked // block)
    noised = (blocks[:, None] * block + np.arange(block)).reshape(-1)
    clean = np.arange(blocks[-1] * block)
    return np.concatenate([noised[noised < length], width + clean]).astype(np.int64)
