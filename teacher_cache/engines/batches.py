"""Packs made into batches of tensors: one behind the other under full attention, padded side by side elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from shared.diffusion.padding import pad
from shared.models.packed_attention import packed_arguments
from teacher_cache.engines.packs import Pack, pack_requests
from teacher_cache.method.comp_demo import Request
from teacher_cache.teachers.registry import Attention, Full


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes, and where in it the read positions stand: pack by pack, member by member."""

    arguments: dict[str, Any]
    row: Int[Tensor, " read"]
    column: Int[Tensor, " read"]

    @property
    def rows(self) -> int:
        """Rows that the model runs, padding included."""
        return int(self.arguments["input_ids"].numel())


def fill(widths: Sequence[int], budget: int, padded: bool) -> list[list[int]]:
    """Indices in batches, longest first, each of at most `budget` rows (or one pack), padding counted where there is
    any.
    """
    order = sorted(range(len(widths)), key=lambda i: (-widths[i], i))
    batches: list[list[int]] = []
    total = 0
    for i in order:
        grown = (
            widths[batches[-1][0]] * (len(batches[-1]) + 1)
            if batches and padded
            else total + widths[i]
        )
        if batches and grown <= budget:
            batches[-1].append(i)
            total += widths[i]
        else:
            batches.append([i])
            total = widths[i]
    return batches


def lay_out(
    attention: Attention, requests: Sequence[Request], shift: int, budget: int, model_width: int
) -> list[list[Pack]]:
    """The packs of each forward pass of at most `budget` rows (see `pack_requests`)."""
    packs = pack_requests(attention, requests, shift, budget, model_width)
    batches = fill([pack.width for pack in packs], budget, padded=not isinstance(attention, Full))
    return [[packs[i] for i in batch] for batch in batches]


def one_behind_the_other(packs: Sequence[Pack], device: torch.device) -> Batch:
    """For a model under `packed_attention`."""
    ends = np.concatenate([[0], np.cumsum([pack.width for pack in packs])])
    columns = [
        column + start
        for pack, start in zip(packs, ends[:-1], strict=True)
        for column in pack.columns
    ]
    column = _longs(np.concatenate(columns), device)
    edges = torch.from_numpy(ends.astype(np.int32)).to(device, non_blocking=True)
    ids, positions = (
        _longs(np.concatenate([getattr(pack, name) for pack in packs]), device)[None]
        for name in ("ids", "positions")
    )
    arguments = packed_arguments(edges, max(pack.width for pack in packs))
    return Batch(
        {"input_ids": ids, "position_ids": positions, **arguments}, torch.zeros_like(column), column
    )


def side_by_side(packs: Sequence[Pack], device: torch.device) -> Batch:
    """For a model under SDPA: padded, with the mask that the packs' labels say."""
    ids, valid = pad([pack.ids for pack in packs])
    names = ("positions", "segments", "blocks", "ranks", "alone")
    labels = [pad([getattr(pack, name).astype(np.int64) for pack in packs])[0] for name in names]
    ids, valid, positions, segments, blocks, ranks, alone = (
        x.to(device, non_blocking=True) for x in (ids, valid, *labels)
    )
    row = np.repeat(np.arange(len(packs)), [sum(len(c) for c in pack.columns) for pack in packs])
    column = np.concatenate([column for pack in packs for column in pack.columns])
    mask = labelled_mask(segments, blocks, ranks, alone.bool(), valid)
    arguments = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    return Batch(arguments, _longs(row, device), _longs(column, device))


def labelled_mask(
    segments: Int[Tensor, "batch width"],
    blocks: Int[Tensor, "batch width"],
    ranks: Int[Tensor, "batch width"],
    alone: Bool[Tensor, "batch width"],
    valid: Bool[Tensor, "batch width"],
) -> Bool[Tensor, "batch 1 width width"]:
    """The rule of `Pack`. Padding is seen by none; every row sees itself, so that none is empty."""
    q, k = (slice(None), slice(None), None), (slice(None), None, slice(None))
    own = (
        (segments[q] == segments[k])
        & (ranks[k] <= ranks[q])
        & (~alone[q] | (blocks[q] == blocks[k]))
    )
    shared = (segments[k] == 0) & (segments[q] > 0) & (blocks[k] < blocks[q])
    itself = torch.eye(segments.shape[1], dtype=torch.bool, device=segments.device)
    return (((own | shared) & valid[k]) | itself)[:, None]


def _longs(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device, non_blocking=True)
