"""The definition of each attention mode: whole sequences, an explicit mask, and where to read.

What an engine runs (`packs`) gives the same values with fewer rows. Modes that run on two copies of
the sequence rebuild the clean copy x_0 from the request's gold ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from shared.diffusion.attention import block_causal, full, pad
from teacher_cache.engines.packs import clean_ids, observed_first
from teacher_cache.method.comp_demo import Request
from teacher_cache.teachers.registry import Attention, BlockCausal, Full, Native, X0Xt
from tests.plain_masks import block_diffusion_batch, repeat_positions, within_block_causal


@dataclass(frozen=True)
class Inputs:
    """One padded batch. `columns` says, request by request, the column of each read position."""

    ids: Int[Tensor, "batch width"]
    positions: Int[Tensor, "batch width"]
    mask: Bool[Tensor, "batch 1 width width"]
    columns: Int[Tensor, " read"]


def build_inputs(attention: Attention, requests: Sequence[Request]) -> Inputs:
    """The batch in the form that the attention mode asks for."""
    ids, valid = pad([r.ids for r in requests])
    read = torch.from_numpy(np.concatenate([r.read for r in requests])).long()
    batch, length = ids.shape
    single = torch.arange(length).expand(batch, -1)
    twice = repeat_positions(length, batch)
    clean, _ = pad([clean_ids(r) for r in requests])
    match attention:
        case Full():
            return Inputs(ids, single, full(valid), read)
        case BlockCausal(block=block):
            return Inputs(ids, single, block_causal(valid, block), read)
        case X0Xt(block=block):
            mask = block_diffusion_batch(valid, block, "x0_xt")
            return Inputs(torch.cat([clean, ids], 1), twice, mask, read + length)
        case Native(block=block):
            orders = [observed_first(r, block) for r in requests]
            permuted, _ = pad([r.ids[order] for r, order in zip(requests, orders, strict=True)])
            places, _ = pad(orders)
            columns = [np.argsort(order)[r.read] for r, order in zip(requests, orders, strict=True)]
            return Inputs(
                torch.cat([clean, permuted], 1),
                torch.cat([single, places], 1),
                within_block_causal(valid, block),
                torch.from_numpy(np.concatenate(columns)).long() + length,
            )
