"""From requests to the tensors of a forward pass: requests → packs → batches.

The passes of an example (two of CompDemo, of every draw) differ in what they mask. Under block
attention what comes before a block is clean, and so the same for all of them: it is laid out once,
and behind it those blocks of each pass that are read. The values are those of whole sequences under
an explicit mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from shared.diffusion import pad
from shared.models.flex import block_mask
from teacher_cache.method import Request
from teacher_cache.teachers.registry import Attention, BlockCausal, Full, Native

Row = Int[np.ndarray, " _"]
# What a forward pass takes, and the row and column of every position that is read, pack by pack.
Batch = tuple[dict[str, Any], Int[torch.Tensor, " read"], Int[torch.Tensor, " read"]]


@dataclass(frozen=True)
class Pack:
    """One sequence for one or more requests, with labels that say which rows see each other.

    A row sees the rows of its own segment whose rank is not above its own, and the earlier blocks
    of segment 0.
    """

    members: tuple[int, ...]  # the requests, by number
    columns: tuple[Row, ...]  # for each of them, where the rows stand at which it is read
    ids: Row
    positions: Row
    segments: Row
    ranks: Row
    block: int


def clean_ids(request: Request) -> Int[np.ndarray, " length"]:
    """x_0: the request's ids with the gold ones in place of its masks."""
    ids = request.ids.copy()
    ids[request.read] = request.gold
    return ids


def observed_first(request: Request, block: int) -> Int[np.ndarray, " length"]:
    """WeDLM's order: inside each block the observed positions, then the masked ones."""
    places = np.arange(len(request.ids))
    masked = np.isin(places, request.read)
    return np.lexsort((places, masked, places // block)).astype(np.int32)


def pack_requests(
    attention: Attention, requests: Sequence[Request], shift: int = 0, budget: int = 1 << 62
) -> list[Pack]:
    """All requests, each in one pack. A pack is at most `budget` rows wide, or has one request.

    `shift` 1: the row of position i − 1 answers for position i. ValueError where that asks for a
    row before the first.
    """
    packs: list[Pack] = []
    together: dict[bytes, list[int]] = {}
    for i, request in enumerate(requests):
        if len(request.read) and request.read.min() < shift:
            raise ValueError("position 0 is read of a shifted teacher, in which no row predicts it")
        if isinstance(attention, Full):
            places, one = np.arange(len(request.ids)), np.zeros(len(request.ids), np.int64)
            columns = (request.read.astype(np.int64) - shift,)
            packs.append(Pack((i,), columns, request.ids, places, one, one, 1))
        else:  # requests over one text share its clean copy, and so a pack
            together.setdefault(clean_ids(request).tobytes(), []).append(i)

    # A pack that is too wide is halved, and its halves in turn.
    waiting = list(together.values())
    while waiting:
        members = waiting.pop()
        pack = _behind_what_is_shared(attention, requests, members, shift)
        if len(pack.ids) > budget and len(members) > 1:
            half = len(members) // 2
            waiting += [members[:half], members[half:]]
        else:
            packs.append(pack)
    return packs


def _behind_what_is_shared(
    attention: Any, requests: Sequence[Request], members: Sequence[int], shift: int
) -> Pack:
    """Segment 0, which all requests share, and behind it of each request the blocks that are read.

    Block-causal: segment 0 has the blocks before the first in which the requests differ. Else the
    sequence is [x_0 ; x_t, x_t', …], and segment 0 has of x_0 the blocks before the last read one.
    """
    block, native = attention.block, isinstance(attention, Native)
    apart = not isinstance(attention, BlockCausal)
    asked = [requests[i].read.astype(np.int64) - shift for i in members]
    ends = [(int(rows.max()) // block + 1) * block if rows.size else 0 for rows in asked]

    # 1. Segment 0. Its rows see it causally (rank = position) or block by block.
    first = requests[members[0]]
    if apart:
        common, ids = max(ends) - block, clean_ids(first)
    else:
        differs = np.any([requests[i].ids != first.ids for i in members], axis=0)
        common = int(differs.argmax()) // block * block if differs.any() else len(first.ids)
        common, ids = min(common, max(ends)), first.ids
    before = np.arange(max(0, common))
    parts = [(before, ids[before], before if native else before // block)]
    columns, width = [], len(before)

    for i, rows, end in zip(members, asked, ends, strict=True):
        # 2. A segment of each request, in the order in which its rows see each other.
        request = requests[i]
        every = np.arange(len(request.ids))
        order = observed_first(request, block) if native else every
        ranks = every if native else order // block
        # 3. Of it the blocks that are read: no other row looks at a block of x_t. Block-causal
        #    rows see all that comes before them, so that the rest runs up to the last read block.
        if apart:
            kept = np.isin(order // block, np.unique(rows // block))
        else:
            kept = (order >= common) & (order < end)
        places = order[kept]
        parts.append((places, request.ids[places], ranks[kept]))
        # 4. The column of every position that is asked about; the prefix is read where it stands.
        column = every.copy()
        column[places] = width + np.arange(len(places))
        columns.append(column[rows])
        width += len(places)

    segments = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])
    labels = zip(*parts, strict=True)
    places, ids, ranks = (np.concatenate(label).astype(np.int64) for label in labels)
    if apart:  # each block of a request is a segment of its own
        segments += (segments > 0) * len(parts) * (places // block)
    return Pack(tuple(members), tuple(columns), ids, places, segments, ranks, block)


def fill(widths: Sequence[int], budget: int, padded: bool) -> list[list[int]]:
    """Indices in batches, longest first, of at most `budget` rows (or one pack) with padding."""
    order = sorted(range(len(widths)), key=lambda i: (-widths[i], i))
    batches: list[list[int]] = []
    total = 0
    for i in order:
        # The first of a batch is its longest, to which all others are padded.
        total += widths[batches[-1][0]] if padded and batches else widths[i]
        if batches and total <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            total = widths[i]
    return batches


def one_behind_the_other(packs: Sequence[Pack], device: torch.device, multiple: int = 1) -> Batch:
    """A batch of one row under packed attention, without a mask; padding is its own sequence."""
    if more := -sum(len(pack.ids) for pack in packs) % multiple:
        blank = np.zeros(more, np.int64)
        packs = [*packs, Pack((), (), blank, blank, blank, blank, 1)]
    ends = np.concatenate([[0], np.cumsum([len(pack.ids) for pack in packs])])
    columns = []
    for pack, start in zip(packs, ends[:-1], strict=True):
        columns += [column + start for column in pack.columns]
    arguments = {
        "input_ids": _longs([pack.ids for pack in packs], device)[None],  # [1, rows]
        "position_ids": _longs([pack.positions for pack in packs], device)[None],
        # Of four dimensions, so that transformers makes none of its own; nobody reads it.
        "attention_mask": torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device),
        # Under the names of transformers' own packed batches: 0, and where each sequence ends.
        "cu_seq_lens_q": _longs([ends], device).int(),
        "cu_seq_lens_k": torch.from_numpy(ends),  # the same, read in Python: no wait for the device
        "max_length_q": max(len(pack.ids) for pack in packs),
    }
    column = _longs(columns, device)
    return arguments, torch.zeros_like(column), column


# Whether q sees k, as `Pack` has it. A lambda: see `shared.diffusion.sees`.
sees = lambda q_segment, k_segment, q_rank, k_rank, q_block, k_block: (  # noqa: E731
    (q_segment == k_segment) & (q_rank >= k_rank) | (k_segment == 0) & (q_block > k_block)
)


def side_by_side(
    packs: Sequence[Pack], device: torch.device, multiple: int = 1, flex: bool = False
) -> Batch:
    """A padded batch with the mask that the packs' labels say: dense, for a model under SDPA, or
    for `flex` a block mask.
    """
    labels = []  # each [packs, width]
    for name in ("ids", "positions", "segments", "ranks"):
        padded, valid = pad([getattr(pack, name) for pack in packs], multiple)
        if name == "segments":  # padding is seen by none, and sees itself: no row is empty
            padded = torch.where(valid, padded, -torch.arange(1, padded.shape[1] + 1))
        labels.append(padded.to(device, non_blocking=True))
    ids, positions, segments, ranks = labels
    # Segments, ranks and numbers of blocks, small: flex_attention reads them pair by pair.
    s, r, n = segments.int(), ranks.int(), (positions // packs[0].block).int()
    if flex:
        rule = lambda b, _, q, k: sees(s[b, q], s[b, k], r[b, q], r[b, k], n[b, q], n[b, k])  # noqa: E731
        mask: Any = block_mask(rule, ids)
    else:
        mask = sees(*(x for y in (s, r, n) for x in (y[:, :, None], y[:, None])))[:, None]
    arguments = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    counts = [sum(len(column) for column in pack.columns) for pack in packs]
    row = _longs([np.repeat(np.arange(len(packs)), counts)], device)
    return arguments, row, _longs([c for pack in packs for c in pack.columns], device)


def _longs(parts: Sequence[np.ndarray], device: torch.device) -> Int[torch.Tensor, " n"]:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device, non_blocking=True)
