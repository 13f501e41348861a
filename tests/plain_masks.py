"""Attention masks from their definitions: what the product's are compared with."""

from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor


def block_diffusion(
    length: int, block: int, order: Literal["xt_x0", "x0_xt"] = "xt_x0"
) -> Bool[Tensor, "double double"]:
    """Over [x_t ; x_0] (or [x_0 ; x_t]): own block of own copy, and earlier clean blocks."""
    blocks = (torch.arange(length) // block).repeat(2)
    clean = torch.arange(2 * length) >= length
    clean = clean if order == "xt_x0" else ~clean
    own = (blocks[:, None] == blocks[None, :]) & (clean[:, None] == clean[None, :])
    return own | ((blocks[:, None] > blocks[None, :]) & clean[None, :])


def block_diffusion_batch(
    valid: Bool[Tensor, "batch length"], block: int, order: Literal["xt_x0", "x0_xt"] = "xt_x0"
) -> Bool[Tensor, "batch 1 double double"]:
    """`block_diffusion` for a padded batch: padded keys are hidden, no row is empty."""
    return hide_padding(block_diffusion(valid.shape[1], block, order), valid)


def within_block_causal(
    valid: Bool[Tensor, "batch length"], block: int
) -> Bool[Tensor, "batch 1 double double"]:
    """WeDLM's mask over [x_0 ; x_t] for a padded batch, x_t permuted inside its blocks.

    A clean position sees the clean ones up to itself; a noised one sees the earlier clean blocks,
    and the noised positions of its own block up to itself.
    """
    index = torch.arange(valid.shape[1])
    causal, blocks = index[:, None] >= index[None, :], index // block
    clean = torch.cat([causal, torch.zeros_like(causal)], dim=1)
    own = causal & (blocks[:, None] == blocks[None, :])
    noised = torch.cat([blocks[:, None] > blocks[None, :], own], dim=1)
    return hide_padding(torch.cat([clean, noised]), valid)


def hide_padding(
    mask: Bool[Tensor, "double double"], valid: Bool[Tensor, "batch length"]
) -> Bool[Tensor, "batch 1 double double"]:
    """A mask over two copies of the sequence, padded keys hidden; every position sees itself."""
    seen = mask[None] & valid.repeat(1, 2)[:, None, :]
    return (seen | torch.eye(mask.shape[0], dtype=torch.bool))[:, None]
