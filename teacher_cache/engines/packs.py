"""What the engine runs: requests without the rows that nobody reads, and without one row twice.

The passes of an example (two of CompDemo, of every draw) differ in what they mask. Under block attention what comes
before a block is clean, and so the same for all of them: it is laid out once, and behind it those blocks of each pass
that are read. `inputs.build_inputs` is the plain definition that this equals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from teacher_cache.engines.inputs import clean_ids, observed_first
from teacher_cache.method.comp_demo import Request
from teacher_cache.teachers.registry import Attention, BlockCausal, Full, Native, X0Xt

Row = Int[np.ndarray, " _"]


@dataclass(frozen=True)
class Pack:
    """One sequence for one or more requests (`members`, by number). What a row sees stands in four labels:

    rows of its own segment whose rank is not above its own, of these only its own block where it stands `alone`; and,
    from another segment than 0, the earlier blocks of segment 0. Under full attention there is one segment, of rank 0.
    """

    members: tuple[int, ...]
    columns: tuple[Row, ...]
    """For each member, where the rows stand at which it is read."""
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


def pack_requests(
    attention: Attention,
    requests: Sequence[Request],
    shift: int = 0,
    budget: int = 1 << 62,
    model_width: int | None = None,
) -> list[Pack]:
    """All requests, each in one pack. A pack is at most `budget` rows wide, or has one request.

    `shift` 1: the row of position i − 1 answers for position i. ValueError where that asks for a row before the first.
    `model_width`: the model's hidden size. Attention looks at all pairs of a pack's rows, so that in a narrow model
    wide packs cost more than the rows they save: they are cut where two are cheaper.
    """
    for request in requests:
        if len(request.read) and request.read.min() < shift:
            raise ValueError(
                "position 0 is read of a teacher whose row i predicts token i + 1: no row predicts it"
            )
    if isinstance(attention, Full):
        return [_whole(i, request, shift) for i, request in enumerate(requests)]
    together: dict[bytes, list[int]] = {}
    for i, request in enumerate(requests):
        together.setdefault(clean_ids(request).tobytes(), []).append(i)
    make: Any = _behind_prefix if isinstance(attention, BlockCausal) else _behind_clean

    def cut(members: list[int]) -> list[Pack]:
        whole: Pack = make(attention, requests, members, shift)
        if len(members) == 1:
            return [whole]
        half = len(members) // 2
        if whole.width > budget:
            return cut(members[:half]) + cut(members[half:])
        if model_width is None or not _may_be_cut(whole, model_width):
            return [whole]
        halves = cut(members[:half]) + cut(members[half:])
        cheaper = sum(_cost(pack, model_width) for pack in halves) < _cost(whole, model_width)
        return halves if cheaper else [whole]

    return [pack for members in together.values() for pack in cut(members)]


def _may_be_cut(pack: Pack, model_width: int) -> bool:
    """Whether two packs could cost less: at most half of the pairs go, and segment 0 comes once more."""
    again = int((pack.segments == 0).sum())
    return pack.width**2 > 2 * again * 6 * model_width


def _cost(pack: Pack, model_width: int) -> int:
    """Of a pack's rows and pairs, in proportion: a row costs 24 · width² operations a layer, a pair 4 · width."""
    return pack.width * (6 * model_width + pack.width)


def _whole(number: int, request: Request, shift: int) -> Pack:
    zeros = np.zeros(len(request.ids), np.int64)
    places = np.arange(len(request.ids))
    return Pack(
        (number,),
        (request.read.astype(np.int64) - shift,),
        request.ids,
        places,
        zeros,
        zeros,
        zeros,
        zeros > 0,
    )


@dataclass
class _Layout:
    """A pack as it grows."""

    places: list[Row]
    ids: list[Row]
    segments: list[Row]
    ranks: list[Row]
    columns: list[Row]
    width: int = 0

    def add(self, segment: int, places: Row, ids: Row, ranks: Row) -> int:
        """Rows at the end; the column of the first."""
        self.places.append(places.astype(np.int64))
        self.ids.append(ids.astype(np.int64))
        self.segments.append(np.full(len(places), segment))
        self.ranks.append(ranks.astype(np.int64))
        start, self.width = self.width, self.width + len(places)
        return start

    def finish(self, members: Sequence[int], block: int, alone: bool) -> Pack:
        """The pack; `alone`: rows behind segment 0 see of their own segment no other block."""
        places, ids, segments, ranks = (
            np.concatenate(x) for x in (self.places, self.ids, self.segments, self.ranks)
        )
        return Pack(
            tuple(members),
            tuple(self.columns),
            ids,
            places,
            segments,
            places // block,
            ranks,
            (segments > 0) & alone,
        )


def _behind_clean(
    attention: X0Xt | Native, requests: Sequence[Request], members: Sequence[int], shift: int
) -> Pack:
    """x_0 up to the last block that is read, and of each request's x_t the blocks that are."""
    block, causal = attention.block, isinstance(attention, Native)
    clean = clean_ids(requests[members[0]])
    last = max(
        (int((requests[i].read.max() - shift) // block) for i in members if len(requests[i].read)),
        default=0,
    )
    before = np.arange(last * block)
    layout = _Layout([], [], [], [], [])
    layout.add(0, before, clean[before], before if causal else before // block)
    for segment, i in enumerate(members, 1):
        request = requests[i]
        order = observed_first(request, block) if causal else np.arange(len(request.ids))
        asked = request.read.astype(np.int64) - shift
        ranks = np.arange(len(order)) if causal else order // block
        kept = np.isin(order // block, np.unique(asked // block))
        start = layout.add(segment, order[kept], request.ids[order[kept]], ranks[kept])
        column = np.full(len(request.ids), -1)
        column[order[kept]] = start + np.arange(kept.sum())
        layout.columns.append(column[asked])
    return layout.finish(members, block, alone=True)


def _behind_prefix(
    attention: BlockCausal, requests: Sequence[Request], members: Sequence[int], shift: int
) -> Pack:
    """The blocks at the beginning that all requests have in common, and of each the rest up to the last one read."""
    block = attention.block
    asked = [requests[i].read.astype(np.int64) - shift for i in members]
    length = len(requests[members[0]].ids)
    ends = [min(length, (int(own.max()) // block + 1) * block) if own.size else 0 for own in asked]
    ids = np.stack([requests[i].ids for i in members])
    different = np.flatnonzero((ids != ids[0]).any(axis=0))
    common = min(max(ends), (int(different[0]) // block * block) if different.size else length)
    layout = _Layout([], [], [], [], [])
    prefix = np.arange(common)
    layout.add(0, prefix, ids[0, :common], prefix // block)
    for segment, (own, end, positions) in enumerate(zip(ids, ends, asked, strict=True), 1):
        rest = np.arange(common, max(common, end))
        start = layout.add(segment, rest, own[rest], rest // block)
        layout.columns.append(np.where(positions < common, positions, positions - common + start))
    return layout.finish(members, block, alone=False)
