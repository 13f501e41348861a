"""Padded batches and their attention masks: True where a query (row) may look at a key (column).

Explicit, because a model given no mask, or a 2-D padding mask, falls back to causal attention.
Padding hides keys only, never whole rows: a row that sees nothing is NaN on some GPUs.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


def pad(
    sequences: Sequence[Int[np.ndarray, " _"]],
) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    """Right-padded ids and the mask of real positions. The pad value 0 is never looked at."""
    shape = (len(sequences), max(len(sequence) for sequence in sequences))
    ids, valid = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        copy = sequence.astype(np.int64)  # Arrow's arrays are read-only
        ids[i, : len(sequence)] = torch.from_numpy(copy)
        valid[i, : len(sequence)] = True
    return ids, valid


def full(valid: Bool[Tensor, "batch length"]) -> Bool[Tensor, "batch 1 length length"]:
    """Every position sees every real position. `valid` is False at padding."""
    batch, length = valid.shape
    return valid[:, None, None, :].expand(batch, 1, length, length)


def block_causal(
    valid: Bool[Tensor, "batch length"], block: int
) -> Bool[Tensor, "batch 1 length length"]:
    """Every position sees its own block of `block` positions and all earlier ones, but no padding.

    A padded position sees itself, so that no row is empty.
    """
    length = valid.shape[1]
    index = torch.arange(length, device=valid.device)
    seen = (index[:, None] // block >= index[None, :] // block)[None] & valid[:, None, :]
    return (seen | torch.eye(length, dtype=torch.bool, device=valid.device))[:, None]


def block_diffusion_places(
    places: Int[Tensor, "batch rows"], length: int, block: int, draws: int = 1
) -> Bool[Tensor, "batch 1 rows rows"]:
    """The block-diffusion mask between chosen places of [x_t1 ; … ; x_0], each `length` long.

    A noised place sees its own noised block and all earlier clean blocks, a clean one the clean
    blocks up to its own. The last block may be shorter than `block`; `draws`: how many x_t there
    are. Place −1 is padding: seen by none; it sees itself, so that no row is empty.
    """
    blocks, copies, seen = places % length // block, places // length, places >= 0
    q, k = (slice(None), slice(None), None), (slice(None), None, slice(None))
    own = (blocks[q] == blocks[k]) & (copies[q] == copies[k])
    clean = (blocks[q] > blocks[k]) & (copies[k] == draws)
    itself = torch.eye(places.shape[1], dtype=torch.bool, device=places.device)
    return (((own | clean) & seen[k]) | itself)[:, None]
