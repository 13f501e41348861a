"""From requests to the tensors of a forward pass: requests → packs → batches.

The passes of an example (two of CompDemo, of every draw) differ in what they mask. Under block
attention what comes before a block is clean, and so the same for all of them: it is laid out once,
and behind it those blocks of each pass that are read. No row is run that nobody reads, and none
twice. The values are those of whole sequences under an explicit mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from shared.diffusion.attention import pad
from shared.models.packed_attention import packed_arguments
from teacher_cache.method.comp_demo import Request
from teacher_cache.teachers.registry import Attention, BlockCausal, Full, Native, X0Xt

Row = Int[np.ndarray, " _"]


@dataclass(frozen=True)
class Pack:
    """One sequence for one or more requests, with labels that say which rows see each other.

    A row sees the rows of its own segment whose rank is not above its own (where it stands `alone`,
    only those of its own block), and of segment 0, where it is in another, the earlier blocks.
    Under full attention there is one segment, of rank 0.
    """

    members: tuple[int, ...]  # the requests, by number
    columns: tuple[Row, ...]  # for each of them, where the rows stand at which it is read
    ids: Row
    positions: Row
    segments: Row
    blocks: Row
    ranks: Row
    alone: Bool[np.ndarray, " _"]

    @property
    def width(self) -> int:
        """Rows that the model runs."""
        return len(self.ids)


# --- Requests → packs


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
    for request in requests:
        if len(request.read) and request.read.min() < shift:
            raise ValueError("position 0 is read of a shifted teacher, in which no row predicts it")
    if isinstance(attention, Full):
        return [_whole(i, request, shift) for i, request in enumerate(requests)]

    # 1. Requests over one text share its clean copy, and so a pack.
    together: dict[bytes, list[int]] = {}
    for i, request in enumerate(requests):
        together.setdefault(clean_ids(request).tobytes(), []).append(i)

    # 2. A pack that is too wide is halved, and its halves in turn.
    make: Any = _behind_prefix if isinstance(attention, BlockCausal) else _behind_clean
    packs: list[Pack] = []
    waiting = list(together.values())
    while waiting:
        members = waiting.pop()
        pack: Pack = make(attention, requests, members, shift)
        if pack.width > budget and len(members) > 1:
            half = len(members) // 2
            waiting += [members[:half], members[half:]]
        else:
            packs.append(pack)
    return packs


def _whole(number: int, request: Request, shift: int) -> Pack:
    """Full attention: the sequence as it is."""
    zeros = np.zeros(len(request.ids), np.int64)
    columns = (request.read.astype(np.int64) - shift,)
    places = np.arange(len(request.ids))
    return Pack((number,), columns, request.ids, places, zeros, zeros, zeros, zeros > 0)


def _behind_clean(
    attention: X0Xt | Native, requests: Sequence[Request], members: Sequence[int], shift: int
) -> Pack:
    """[x_0 ; x_t, x_t', …]: of x_0 the blocks before the last read one, of each x_t those read."""
    block, causal = attention.block, isinstance(attention, Native)
    asked = [requests[i].read.astype(np.int64) - shift for i in members]

    # 1. Segment 0, the clean copy. Its rows see it causally (rank = position) or block by block.
    last = max((int(rows.max()) // block for rows in asked if rows.size), default=0)
    before = np.arange(last * block)
    clean = clean_ids(requests[members[0]])[before]
    parts = [(before, clean, before if causal else before // block)]
    columns, width = [], len(before)

    for i, rows in zip(members, asked, strict=True):
        # 2. A segment of each request, in the order in which its rows see each other.
        request = requests[i]
        order = observed_first(request, block) if causal else np.arange(len(request.ids))
        ranks = np.arange(len(order)) if causal else order // block
        # 3. Of it the blocks that are read: no other row looks at a block of x_t.
        kept = np.isin(order // block, np.unique(rows // block))
        places = order[kept]
        parts.append((places, request.ids[places], ranks[kept]))
        # 4. The column of every position that is asked about.
        column = np.full(len(request.ids), -1)
        column[places] = width + np.arange(len(places))
        columns.append(column[rows])
        width += len(places)
    return _join(members, columns, parts, block, alone=True)


def _behind_prefix(
    attention: BlockCausal, requests: Sequence[Request], members: Sequence[int], shift: int
) -> Pack:
    """The blocks at the beginning that all requests share, and of each the rest that is read."""
    block = attention.block
    asked = [requests[i].read.astype(np.int64) - shift for i in members]
    ids = np.stack([requests[i].ids for i in members])
    length = ids.shape[1]

    # 1. Each request is run up to the last block that it reads.
    ends = [
        min(length, (int(rows.max()) // block + 1) * block) if rows.size else 0 for rows in asked
    ]

    # 2. Segment 0: the blocks before the first in which the requests differ.
    different = np.flatnonzero((ids != ids[0]).any(axis=0))
    common = int(different[0]) // block * block if different.size else length
    common = min(common, max(ends))
    prefix = np.arange(common)
    parts = [(prefix, ids[0, :common], prefix // block)]
    columns, width = [], common

    # 3. A segment of each request, with what follows. Positions of the prefix are read there.
    for own, end, rows in zip(ids, ends, asked, strict=True):
        rest = np.arange(common, max(common, end))
        parts.append((rest, own[rest], rest // block))
        columns.append(np.where(rows < common, rows, rows - common + width))
        width += len(rest)
    return _join(members, columns, parts, block, alone=False)


def _join(
    members: Sequence[int],
    columns: Sequence[Row],
    parts: Sequence[tuple[Row, Row, Row]],
    block: int,
    alone: bool,
) -> Pack:
    """A pack of segments, each of (positions, ids, ranks); `alone` holds for all but the first."""
    positions = np.concatenate([part[0] for part in parts]).astype(np.int64)
    ids = np.concatenate([part[1] for part in parts]).astype(np.int64)
    ranks = np.concatenate([part[2] for part in parts]).astype(np.int64)
    segments = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])
    by_itself = (segments > 0) & alone
    return Pack(
        tuple(members),
        tuple(columns),
        ids,
        positions,
        segments,
        positions // block,
        ranks,
        by_itself,
    )


# --- Packs → batches


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes, and where in it the read positions stand, pack by pack."""

    arguments: dict[str, Any]
    row: Int[Tensor, " read"]
    column: Int[Tensor, " read"]


def fill(widths: Sequence[int], budget: int, padded: bool) -> list[list[int]]:
    """Indices in batches, longest first, of at most `budget` rows (or one pack) with padding."""
    order = sorted(range(len(widths)), key=lambda i: (-widths[i], i))
    batches: list[list[int]] = []
    total = 0
    for i in order:
        # The first of a batch is its longest, to which all others are padded.
        padded_rows = widths[batches[-1][0]] * (len(batches[-1]) + 1) if batches else 0
        if batches and (padded_rows if padded else total + widths[i]) <= budget:
            batches[-1].append(i)
            total += widths[i]
        else:
            batches.append([i])
            total = widths[i]
    return batches


def lay_out(
    attention: Attention, requests: Sequence[Request], shift: int, budget: int
) -> list[list[Pack]]:
    """The packs of each forward pass of at most `budget` rows (see `pack_requests`)."""
    packs = pack_requests(attention, requests, shift, budget)
    batches = fill([pack.width for pack in packs], budget, padded=not isinstance(attention, Full))
    return [[packs[i] for i in batch] for batch in batches]


def one_behind_the_other(packs: Sequence[Pack], device: torch.device) -> Batch:
    """A batch of one row for a model under `packed_attention`: neither padding nor mask."""
    ends = np.concatenate([[0], np.cumsum([pack.width for pack in packs])])
    columns = []
    for pack, start in zip(packs, ends[:-1], strict=True):
        columns += [column + start for column in pack.columns]
    edges = torch.from_numpy(ends.astype(np.int32)).to(device, non_blocking=True)
    arguments = {
        "input_ids": _longs([pack.ids for pack in packs], device)[None],  # [1, rows]
        "position_ids": _longs([pack.positions for pack in packs], device)[None],
        **packed_arguments(edges, max(pack.width for pack in packs)),
    }
    column = _longs(columns, device)
    return Batch(arguments, torch.zeros_like(column), column)


def side_by_side(packs: Sequence[Pack], device: torch.device) -> Batch:
    """A padded batch for a model under SDPA, with the mask that the packs' labels say."""

    def padded(name: str) -> Int[Tensor, "packs width"]:
        labels = [getattr(pack, name).astype(np.int64) for pack in packs]
        return pad(labels)[0].to(device, non_blocking=True)

    valid = pad([pack.ids for pack in packs])[1].to(device, non_blocking=True)
    segments, blocks, ranks = padded("segments"), padded("blocks"), padded("ranks")
    # The rule of `Pack`, for every row q and every row k: [packs, width, width].
    q, k = (slice(None), slice(None), None), (slice(None), None, slice(None))
    own = (segments[q] == segments[k]) & (ranks[k] <= ranks[q])
    own &= ~padded("alone").bool()[q] | (blocks[q] == blocks[k])
    clean = (segments[k] == 0) & (segments[q] > 0) & (blocks[k] < blocks[q])
    # Padding is seen by none; every row sees itself, so that none is empty (NaN on some GPUs).
    itself = torch.eye(segments.shape[1], dtype=torch.bool, device=device)
    mask = ((own | clean) & valid[k]) | itself
    arguments = {
        "input_ids": padded("ids"),
        "position_ids": padded("positions"),
        "attention_mask": mask[:, None],
    }
    counts = [sum(len(column) for column in pack.columns) for pack in packs]
    row = _longs([np.repeat(np.arange(len(packs)), counts)], device)
    return Batch(arguments, row, _longs([c for pack in packs for c in pack.columns], device))


def _longs(parts: Sequence[np.ndarray], device: torch.device) -> Int[Tensor, " n"]:
    """All parts as one tensor on `device`."""
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device, non_blocking=True)
