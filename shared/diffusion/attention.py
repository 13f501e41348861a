"""Attention masks as explicit boolean tensors: True where a query (row) may look at a key (column).

Explicit, because a model given no mask, or a 2-D padding mask, falls back to causal attention (DESIGN §5). Padding
hides keys only, never whole rows: a row that sees nothing is NaN on some GPUs.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

Order = Literal["xt_x0", "x0_xt"]


def full(valid: Bool[Tensor, "batch length"]) -> Bool[Tensor, "batch 1 length length"]:
    """Every position sees every real position. `valid` is False at padding."""
    batch, length = valid.shape
    return valid[:, None, None, :].expand(batch, 1, length, length)


def block_causal(
    valid: Bool[Tensor, "batch length"], block: int
) -> Bool[Tensor, "batch 1 length length"]:
    """Every position sees its own block of `block` positions and all earlier ones; padding is seen by none.

    A padded position sees itself, so that no row is empty.
    """
    length = valid.shape[1]
    index = torch.arange(length, device=valid.device)
    seen = (index[:, None] // block >= index[None, :] // block)[None] & valid[:, None, :]
    return (seen | torch.eye(length, dtype=torch.bool, device=valid.device))[:, None]


def block_diffusion(
    length: int, block: int, order: Order = "xt_x0", device: torch.device | str = "cpu"
) -> Bool[Tensor, "double double"]:
    """The block-diffusion mask over [x_t ; x_0] (or [x_0 ; x_t]), each `length` long (DESIGN §3).

    A noised position sees its own noised block and all earlier clean blocks; a clean position sees the clean
    blocks up to its own. The last block may be shorter than `block`.
    """
    blocks = torch.arange(length, device=device) // block
    clean = torch.zeros(2 * length, dtype=torch.bool, device=device)
    if order == "xt_x0":
        clean[length:] = True
    else:
        clean[:length] = True
    return _sees(torch.cat([blocks, blocks]), clean, clean)


def _sees(
    blocks: Int[Tensor, "*batch rows"],
    copies: Shaped[Tensor, "*batch rows"],
    clean: Bool[Tensor, "*batch rows"],
) -> Bool[Tensor, "*batch rows rows"]:
    """The rule of block diffusion: one's own block of one's own copy, and the earlier clean blocks."""
    q, k = (..., slice(None), None), (..., None, slice(None))
    return ((blocks[q] == blocks[k]) & (copies[q] == copies[k])) | (
        (blocks[q] > blocks[k]) & clean[k]
    )


def block_diffusion_places(
    places: Int[Tensor, "batch rows"], length: int, block: int, draws: int = 1
) -> Bool[Tensor, "batch 1 rows rows"]:
    """`block_diffusion` (x_t before x_0) between chosen places of [x_t1 ; … ; x_0], each part `length` long, with
    `draws` of x_t.

    Place −1 is padding: seen by none; it sees itself, so that no row is empty.
    """
    blocks, copies, seen = places % length // block, places // length, places >= 0
    mask = _sees(blocks, copies, copies == draws)
    itself = torch.eye(places.shape[1], dtype=torch.bool, device=places.device)
    return ((mask & seen[:, None, :]) | itself)[:, None]


def block_diffusion_batch(
    valid: Bool[Tensor, "batch length"], block: int, order: Order = "xt_x0"
) -> Bool[Tensor, "batch 1 double double"]:
    """`block_diffusion` for a padded batch: padded keys are hidden, no row is empty."""
    return _hide_padding(block_diffusion(valid.shape[1], block, order, valid.device), valid)


def within_block_causal(
    valid: Bool[Tensor, "batch length"], block: int
) -> Bool[Tensor, "batch 1 double double"]:
    """WeDLM's mask over [x_0 ; x_t] for a padded batch, x_t permuted inside its blocks.

    A clean position sees the clean ones up to itself; a noised one sees the earlier clean blocks, and the noised
    positions of its own block up to itself.
    """
    length = valid.shape[1]
    index = torch.arange(length, device=valid.device)
    causal = index[:, None] >= index[None, :]
    blocks = index // block
    clean = torch.cat([causal, torch.zeros_like(causal)], dim=1)
    own = causal & (blocks[:, None] == blocks[None, :])
    noised = torch.cat([blocks[:, None] > blocks[None, :], own], dim=1)
    return _hide_padding(torch.cat([clean, noised]), valid)


def _hide_padding(
    mask: Bool[Tensor, "double double"], valid: Bool[Tensor, "batch length"]
) -> Bool[Tensor, "batch 1 double double"]:
    """A mask over two copies of the sequence, with padded keys hidden; every position sees itself."""
    seen = mask[None] & valid.repeat(1, 2)[:, None, :]
    return (seen | torch.eye(mask.shape[0], dtype=torch.bool, device=mask.device))[:, None]


def repeat_positions(
    length: int, batch: int, device: torch.device | str = "cpu"
) -> Int[Tensor, "batch double"]:
    """Position ids of [x_t ; x_0]: 0 … length−1, twice."""
    return torch.arange(length, device=device).repeat(2).expand(batch, -1)
