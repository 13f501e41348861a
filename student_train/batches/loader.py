"""From shards to batches: which rows at which step, as a pure function of the seed (DESIGN §6).

Epoch e trains on draw e mod K and reads nothing else. Rows are shuffled in windows of a few shards, so memory stays
bounded and files are read in one go; inside a window batches hold rows of like length. Every item of the data set
is one whole batch, found by its number alone: resuming at step n means asking for batch n.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from shared.errors import TideError
from shared.ledger import Ledger
from shared.manifest import Manifest
from shared.noise import generator
from shared.schema import CacheRow, without_masks
from shared.shards import Unit
from student_train.batches.collate import Batch, collate
from student_train.batches.shards import ShardSource

_RUN = 16
"""Batches among which rows are sorted by length."""


@dataclass(frozen=True)
class _Epoch:
    """The parts of an epoch in their order, window by window, and at which row of the epoch each window begins."""

    parts: np.ndarray
    starts: np.ndarray


class BatchDataset(torch.utils.data.Dataset[Batch]):
    """`total` batches of a training run, or, where `total` is None, `epochs` epochs of them.

    Items are what one process takes at a time. With `processes` > 1 item number i is part i mod `processes` of a
    batch of `batch_size` · `processes` rows, so a step sees the same rows however many processes share it.
    """

    def __init__(
        self,
        manifest: Manifest,
        ledger: Ledger,
        source: ShardSource,
        *,
        batch_size: int,
        seed: int,
        epochs: float,
        total: int | None = None,
        window: int = 8,
        processes: int = 1,
    ) -> None:
        self._manifest, self._source = manifest, source
        self._seed, self._window = seed, window
        self._batch_size, self._processes = batch_size * processes, processes
        self.totals: Counter[str] = Counter()
        """Sums over the shards: rows, masked positions, chunks, rows without chunks."""
        self._rows = np.zeros((manifest.draws, manifest.parts), np.int64)
        for unit in manifest.units():
            entry = ledger[unit]
            self._rows[unit.draw, unit.part] = entry.rows
            self.totals.update(rows=entry.rows, masked=entry.masked, chunks=entry.chunks,
                               rows_without_chunks=entry.rows_without_chunks)  # fmt: skip
        if (self._rows.sum(axis=1) == 0).any():
            raise TideError("the cache has no rows", fix="build it from data whose prompts fit")
        self._batches = -(-self._rows.sum(axis=1) // self._batch_size)
        self._epoch_cached = lru_cache(maxsize=2)(self._epoch)
        self._read_window = lru_cache(maxsize=2)(self._read_window_uncached)
        self._total = total if total is not None else math.ceil(epochs * self.batches_in(0))

    def batches_in(self, epoch: int) -> int:
        """Batches of an epoch."""
        return int(self._batches[epoch % self._manifest.draws])

    def _epoch(self, epoch: int) -> _Epoch:
        parts = generator(self._seed, epoch, "parts").permutation(self._manifest.parts)
        ends = np.concatenate([[0], np.cumsum(self._rows[epoch % self._manifest.draws][parts])])
        return _Epoch(parts, ends[: len(parts) : self._window])

    def __len__(self) -> int:
        return self._total * self._processes

    def __getitem__(self, index: int) -> Batch:
        """Item number `index` of the run."""
        return collate(self.rows(index), self._manifest)

    def rows(self, index: int) -> list[CacheRow]:
        """The rows of item number `index`. Where a last batch has fewer rows than processes, some get a row that
        another has too, with nothing of it masked.
        """
        index, part = divmod(index, self._processes)
        cycle, index = divmod(index, int(self._batches.sum()))
        draw = int(np.searchsorted(np.cumsum(self._batches), index, side="right"))
        batch = index - int(self._batches[:draw].sum())
        whole = self._slice(cycle * self._manifest.draws + draw, batch * self._batch_size, self._batch_size)
        mine = whole[part :: self._processes]
        return mine or [without_masks(whole[0])]

    def _slice(self, epoch: int, start: int, count: int) -> list[CacheRow]:
        """`count` rows of an epoch from its row number `start` on: of one window, or of two that meet."""
        starts = self._epoch_cached(epoch).starts
        number = int(np.searchsorted(starts, start, side="right")) - 1
        found: list[CacheRow] = []
        while len(found) < count and number < len(starts):
            rows = self._read_window(epoch, number)
            first = max(0, start + len(found) - int(starts[number]))
            found += rows[first : first + count - len(found)]
            number += 1
        return found

    def _parts(self, epoch: int, number: int) -> list[Unit]:
        chosen = self._epoch_cached(epoch).parts[number * self._window : (number + 1) * self._window]
        return [Unit(epoch % self._manifest.draws, int(part)) for part in chosen]

    def _read_window_uncached(self, epoch: int, number: int) -> list[CacheRow]:
        """The rows of a window in the order in which they are trained on."""
        units = self._parts(epoch, number)
        self._source.soon(units)
        rows = [row for unit in units for row in self._source.rows(unit)]
        self._source.soon(self._parts(epoch, number + 1) or self._parts(epoch + 1, 0))
        begun = -int(self._epoch_cached(epoch).starts[number]) % self._batch_size
        stream = generator(self._seed, epoch, number, "rows")
        return [rows[i] for i in self._order([len(row.student_ids) for row in rows], begun, stream)]

    def _order(self, lengths: list[int], begun: int, stream: np.random.Generator) -> list[int]:
        """Shuffled; then, but for the `begun` rows that fill up the last window's batch, sorted by length inside runs
        of 16 batches, and whole batches shuffled.
        """
        order = [int(i) for i in stream.permutation(len(lengths))]
        head, rest = order[:begun], order[begun:]
        span = _RUN * self._batch_size
        by_length = [
            i for at in range(0, len(rest), span) for i in sorted(rest[at : at + span], key=lengths.__getitem__)
        ]
        whole = len(by_length) // self._batch_size * self._batch_size
        batches = [by_length[at : at + self._batch_size] for at in range(0, whole, self._batch_size)]
        return head + [i for b in stream.permutation(len(batches)) for i in batches[b]] + by_length[whole:]
