"""Sequences of different lengths as one padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


def pad(
    sequences: Sequence[Int[np.ndarray, " _"]],
) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    """Right-padded ids and the mask of real positions. The pad value is 0: its keys are hidden, its rows unread."""
    longest = max(len(s) for s in sequences)
    ids = torch.zeros((len(sequences), longest), dtype=torch.long)
    valid = torch.zeros((len(sequences), longest), dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.from_numpy(
            sequence.astype(np.int64)
        )  # a copy: Arrow's arrays are read-only
        valid[i, : len(sequence)] = True
    return ids, valid
