"""Rows of the cache as tensors: padded inputs, and flat targets, one entry per masked position.

Masked positions are gathered row by row, but that those at which a teacher of the student's
tokenizer was not read come last. Draws of one example that follow each other share one sequence
[x_t1 ; … ; x_tm ; x_0], of which only the places that the loss needs are run. Those of several
examples stand in one row where that leaves less padding.
"""

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from shared.aligned.token_map import owners
from shared.cache.manifest import Manifest
from shared.cache.row import CacheRow, Layout, TokenMap
from shared.cache.tail import LinearTail
from shared.diffusion import pad
from student_train.losses.objective import Counts
from student_train.losses.targets import ChunkTargets, StudentTokens, Targets, TopKTargets

Batch = dict[str, Any]
"""Tensors by name, and `chunk_host` and `topk_place`, arrays that stay in host memory."""


def collate(
    rows: Sequence[CacheRow],
    manifest: Manifest,
    token_map: TokenMap | None = None,
    width: int | None = None,
) -> Batch:
    """One batch. `token_map`: where it is to have a top-k of a teacher with a tokenizer of its own;
    `width`: that of `places_of_draws`.
    """
    # 1. Draws of one example stand together: they share x_0.                      (batch, length)
    examples: list[list[CacheRow]] = []
    for row in rows:
        draws = examples[-1] if examples else []
        same = draws and draws[0].example_id == row.example_id
        if same and all(other.draw != row.draw for other in draws):
            draws.append(row)
        else:
            examples.append([row])
    clean, _ = pad([draws[0].student_ids for draws in examples])

    # 2. Of every masked position its example, which x_t of that example, its column, t; and those
    # at which the teacher says something: of a tokenizer of its own, the tokens of chunks.      (n)
    owned = [] if token_map is None else [_owned(row, token_map) for row in rows]
    asked = iter([at for at, _, _ in owned] or [row.asked for row in rows])
    example, copy, column, t, read = [], [], [], [], []
    for i, draws in enumerate(examples):
        for j, row in enumerate(draws):
            example.append(np.full(row.masked.size, i))
            copy.append(np.full(row.masked.size, j))
            column.append(row.masked.astype(np.int64))
            t.append(np.full(row.masked.size, row.t, np.float32))
            read.append(np.isin(row.masked, next(asked)))
    order = np.argsort(~np.concatenate(read), kind="stable")  # unread positions last
    example, copy, column, t = (
        torch.from_numpy(np.concatenate(values)[order]) for values in (example, copy, column, t)
    )

    # 3. The x_t side by side, and which places of [x_t1 ; … ; x_0] the student must run.
    length = clean.shape[1]
    noised = clean.repeat(1, max(len(draws) for draws in examples))  # (batch, m · length)
    noised[example, copy * length + column] = manifest.fingerprint.student.mask_id
    masked = [[row.masked for row in draws] for draws in examples]
    lengths = [len(draws[0].student_ids) for draws in examples]
    places, place = places_of_draws(masked, lengths, manifest.fingerprint.lengths.block, width)

    # 4. The denominators: maskable tokens, positions read, active chunks.
    maskable = sum(row.maskable for row in rows)
    counted = sum(row.asked.size for row in rows)  # all masked ones, of another tokenizer
    chunks = sum(row.chunk_logp.size for row in rows if row.chunk_logp is not None)
    batch: Batch = {
        "clean": clean,
        "noised": noised,
        "row": example,
        "column": column,
        "places": places,
        "place": place[torch.from_numpy(order)],
        "gold": clean[example, column],
        "t": t,
        "tokens": torch.tensor(sum(len(row.student_ids) for row in rows)),
        "counts": torch.tensor([maskable, counted, chunks], dtype=torch.float64),
    }
    if token_map is not None or ("topk" in manifest.signals and manifest.shared_tokenizer):
        batch |= _topk(rows, owned)
    if "chunks" in manifest.signals:
        batch |= _chunks(rows, order)
    return batch


def places_of_draws(
    masked: Sequence[Sequence[Int[np.ndarray, " _"]]],
    lengths: Sequence[int],
    block: int,
    width: int | None = None,
) -> tuple[Int[torch.Tensor, "packed rows"], Int[torch.Tensor, " n"]]:
    """Which places of [x_t1 ; … ; x_tm ; x_0] must be run, and at which entry of them, counted row
    by row, each masked position stands. What is left out changes no value that the loss reads.

    `masked`: each example's masked positions, rising, draw by draw; m is the most draws that an
    example has. With n the longest length, position i of x_tj is place (j − 1)·n + i, x_0's is
    place m·n + i, and those of the next example follow. An example has a row of its own, but with a
    `width` examples share rows up to that, or up to the longest. Rows are padded with −1.
    """
    longest, copies = max(lengths), max(len(draws) for draws in masked)
    needed, found = [], []
    for draws, length in zip(masked, lengths, strict=True):
        # 1. A block of x_t sees itself and earlier blocks of x_0. So of each x_t the blocks with a
        # masked position are needed (never the prompt's), cut at the example's end.
        parts, last = [], 0
        for j, positions in enumerate(draws):
            blocks = np.unique(positions // block)
            noised = (blocks[:, None] * block + np.arange(block)).reshape(-1)
            parts.append(j * longest + noised[noised < length])
            last = max(last, int(blocks.max(initial=0)))
        # 2. Of x_0 all blocks before the last of these.
        mine = np.concatenate([*parts, copies * longest + np.arange(last * block)])
        needed.append(mine)
        # 3. Places rise, so each masked position is found among them.
        own = [np.searchsorted(mine, one + j * longest) for j, one in enumerate(draws)]
        found.append(np.concatenate(own))
    # 4. Each example's places behind each other, in its row.
    sizes = [len(mine) for mine in needed]
    rows = list(range(len(sizes))) if width is None else pack(sizes, max(width, *sizes))
    ends = [0] * (max(rows) + 1)
    places = np.full((len(ends), max(1, int(np.bincount(rows, sizes).max()))), -1, np.int64)
    for i, (row, mine) in enumerate(zip(rows, needed, strict=True)):
        start, ends[row] = ends[row], ends[row] + len(mine)
        places[row, start : ends[row]] = mine + i * (copies + 1) * longest
        found[i] += row * places.shape[1] + start
    return torch.from_numpy(places), torch.from_numpy(np.concatenate(found).astype(np.int64))


def pack(sizes: Sequence[int], width: int) -> list[int]:
    """A row for each of `sizes`: rows no longer than `width` in all, with the least padding."""
    best, fewest = list(range(len(sizes))), len(sizes) * max(1, *sizes)
    falling = np.argsort(-np.array(sizes), kind="stable").tolist()
    for count in range(len(sizes) - 1, 0, -1):
        # The largest first, each into the row that is the shortest so far.
        rows, ends = list(best), [(0, row) for row in range(count)]
        for i in falling:
            end, rows[i] = ends[0]
            heapq.heapreplace(ends, (end + sizes[i], rows[i]))
        longest = max(1, max(ends)[0])
        if longest <= width and count * longest < fewest:
            best, fewest = rows, count * longest
    return best


Owned = tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"], Int[np.ndarray, " _"]]


def _owned(row: CacheRow, token_map: TokenMap) -> Owned:
    """Of each student token of a row's chunks its position, which of the positions that the teacher
    was read at is its owner's, and its place in that one.
    """
    chunks, teacher = row.chunks, row.teacher_ids
    assert chunks is not None and teacher is not None and row.teacher_masked is not None
    lengths = token_map.teacher_bytes[teacher], token_map.student_bytes[row.student_ids]
    position, owner, place = owners(chunks, *lengths)
    return position, np.searchsorted(row.teacher_masked, owner), place


def _topk(rows: Sequence[CacheRow], owned: Sequence[Owned]) -> Batch:
    """The kept ids of each position that was read, padded to the longest list; of a teacher with a
    tokenizer of its own, those of the owner of each student token.
    """
    # 1. A row's lists lie one after the other, and so do the rows'.
    columns = ("topk_sizes", "topk_ids", "topk_logp", "tail_code", "tail_level")
    sizes, ids, logp, code, level = (
        np.concatenate([getattr(row, name) for row in rows]) for name in columns
    )
    starts = np.cumsum(sizes, dtype=np.int64) - sizes
    found = {}
    if owned:
        read = np.array([row.split.size for row in rows])
        each = zip(np.cumsum(read) - read, owned, strict=True)
        at = np.concatenate([first + own for first, (_, own, _) in each])
        sizes, starts, code, level = (values[at] for values in (sizes, starts, code, level))
        found["topk_place"] = np.concatenate([place for _, _, place in owned])
    # 2. Entry j of list i, or its first entry at padding: a repeated id changes nothing.    (n, k)
    entry = np.arange(int(sizes.max(initial=1)))
    kept = entry < sizes[:, None]
    flat = starts[:, None] + np.where(kept, entry, 0)
    return found | {
        "topk_ids": torch.from_numpy(ids.astype(np.int64)[flat]),
        "topk_logp": torch.from_numpy(logp.astype(np.float32, copy=False)[flat]),
        "topk_kept": torch.from_numpy(kept),
        "tail_code": torch.from_numpy(code),
        "tail_level": torch.from_numpy(level),
    }


def _chunks(rows: Sequence[CacheRow], order: Int[np.ndarray, " n"]) -> Batch:
    """The active chunks, and of each of their tokens its masked position and its chunk."""
    token_rows, chunk_of, logp, t = [], [], [], []
    first_row = first_chunk = 0
    for row in rows:
        spans, teacher_logp = row.chunk_student, row.chunk_logp
        assert spans is not None and teacher_logp is not None
        # 1. The positions of all tokens of the row's chunks, and the chunk of each.       (tokens)
        lengths = spans[:, 1] - spans[:, 0]
        owner = np.repeat(np.arange(len(spans)), lengths)
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        positions = spans[owner, 0] + within
        # 2. Every token of an active chunk is masked, so it is found among the masked ones.
        token_rows.append(first_row + np.searchsorted(row.masked, positions))
        chunk_of.append(first_chunk + owner)
        logp.append(teacher_logp.astype(np.float32, copy=False))
        t.append(np.full(len(spans), row.t, np.float32))
        first_row, first_chunk = first_row + row.masked.size, first_chunk + len(spans)
    # 3. Places after the reordering of the masked positions.
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    host = np.stack([rank[np.concatenate(token_rows)], np.concatenate(chunk_of)])
    return {
        "chunk_host": host,
        "chunk_rows": torch.from_numpy(host[0]),
        "chunk_of": torch.from_numpy(host[1]),
        "chunk_logp": torch.from_numpy(np.concatenate(logp)),
        "chunk_t": torch.from_numpy(np.concatenate(t)),
    }


def padding_of(batches: Sequence[Batch]) -> tuple[float, float]:
    """Which share of the places that are run is padding; which were, with an example a row."""
    real, run, alone = 0, 0, 0
    for batch in batches:
        own = batch["places"][batch["places"] >= 0]
        examples = own // (batch["noised"].shape[1] + batch["clean"].shape[1])
        real, run = real + own.numel(), run + batch["places"].numel()
        alone += len(batch["clean"]) * max(1, int(examples.bincount(minlength=1).max()))
    return 1 - real / run, 1 - real / alone


class TargetReader:
    """From batches to `Targets` for a student of `width` ids. Holds the tables on its device."""

    def __init__(self, layout: Layout, width: int) -> None:
        self._temperatures, self._tail, self._unit = layout.temperatures, None, 1.0
        self._words = None
        if (tables := layout.tables) is not None:
            self._unit, words = tables.unit, tables.token_map
            own = width if words is None else None
            self._tail = LinearTail.of(tables, layout.temperatures, own)
            if words is not None:
                self._words = StudentTokens.of(words, tables.rank_of.size, width)

    def __call__(self, batch: Batch) -> Targets:
        topk = chunks = None
        if "topk_ids" in batch:
            assert self._tail is not None
            ids, logp, kept = batch["topk_ids"], batch["topk_logp"], batch["topk_kept"]
            self._tail = self._tail.to(ids.device)
            if self._words is not None:
                self._words = self._words.to(ids.device)
            level = dict(zip(self._temperatures, batch["tail_level"].unbind(dim=1), strict=True))
            code = batch["tail_code"].float() * self._unit
            place = batch.get("topk_place")
            topk = TopKTargets(ids, logp, kept, code, level, self._tail, place, self._words)
        if "chunk_rows" in batch:
            names = ("chunk_rows", "chunk_of", "chunk_logp", "chunk_t", "chunk_host")
            chunks = ChunkTargets(*(batch[name] for name in names))
        return Targets(batch["gold"], batch["t"], topk, chunks)


def counts_of(counts: torch.Tensor) -> Counts:
    return Counts(*counts.float().unbind())
