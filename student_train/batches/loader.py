"""From shards to batches: which rows at which step, as a pure function of the seed (DESIGN §6).

Epoch e trains on draw e mod K and reads nothing else. Rows are shuffled in windows of a few shards, so memory stays
bounded and files are read in one go; inside a window batches hold rows of like length. Every item of the data set
is one whole batch, found by its number alone: resuming at step n means asking for batch n.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from shared.errors import TideError
from shared.manifest import Manifest, refuse_unfinished
from shared.noise import generator
from shared.schema import CacheRow, without_masks
from shared.shards import Unit, read_shard, shard_counts
from student_train.batches.collate import Batch, collate


@dataclass(frozen=True)
class _Window:
    """Batches first … first+count−1 of an epoch come from these parts."""

    parts: tuple[int, ...]
    first: int
    count: int


class BatchDataset(torch.utils.data.Dataset[Batch]):
    """`total` batches of a training run, or, where `total` is None, `epochs` epochs of them.

    Items are what one process takes at a time. With `processes` > 1 item number i is part i mod `processes` of a
    batch of `batch_size` · `processes` rows, so a step sees the same rows however many processes share it.
    """

    def __init__(
        self,
        cache: Path,
        manifest: Manifest,
        *,
        batch_size: int,
        seed: int,
        epochs: float,
        total: int | None = None,
        window_parts: int = 8,
        processes: int = 1,
    ) -> None:
        self._cache, self._manifest = cache, manifest
        self._seed, self._window_parts = seed, window_parts
        self._batch_size, self._processes = batch_size * processes, processes
        self.totals: Counter[str] = Counter()
        """Sums of the shards' counts: rows, masked positions, chunks, rows without chunks."""
        self._rows = self._count_rows()
        self._plan_cached = lru_cache(maxsize=4)(self._plan)
        self._read_window = lru_cache(maxsize=2)(self._read_window_uncached)
        self._total = total if total is not None else math.ceil(epochs * self.batches_in(0))

    def batches_in(self, epoch: int) -> int:
        """Batches of an epoch (epochs may differ by a few, where shards differ in size)."""
        return sum(window.count for window in self._plan_cached(epoch))

    def _count_rows(self) -> list[list[int]]:
        """Rows of every shard, by draw and part. Opens each one: a damaged cache is refused before training."""
        refuse_unfinished(self._cache, self._manifest)
        digest = self._manifest.digest
        found = [
            [shard_counts(Unit(draw, part).path(self._cache), digest) for part in range(self._manifest.parts)]
            for draw in range(self._manifest.draws)
        ]
        counts = [[shard["rows"] for shard in shards] for shards in found]
        for shard in (shard for shards in found for shard in shards):
            self.totals.update({name: n for name, n in shard.items() if isinstance(n, int)})
        if not any(map(sum, counts)):
            raise TideError(f"the cache {self._cache} has no rows", fix="build it from data whose prompts fit")
        return counts

    def _plan(self, epoch: int) -> list[_Window]:
        counts = self._rows[epoch % self._manifest.draws]
        order = generator(self._seed, epoch, "parts").permutation(len(counts))
        windows, first = [], 0
        for i in range(0, len(order), self._window_parts):
            parts = tuple(int(p) for p in order[i : i + self._window_parts])
            count = math.ceil(sum(counts[p] for p in parts) / self._batch_size)
            windows.append(_Window(parts, first, count))
            first += count
        return windows

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
        epoch = 0
        while index >= (count := self.batches_in(epoch)):
            index -= count
            epoch += 1
        window = next(w for w in self._plan_cached(epoch) if index < w.first + w.count)
        rows, batches = self._read_window(epoch, window)
        mine = batches[index - window.first][part :: self._processes]
        if not mine:
            return [without_masks(rows[batches[index - window.first][0]])]
        return [rows[i] for i in mine]

    def _read_window_uncached(self, epoch: int, window: _Window) -> tuple[list[CacheRow], list[list[int]]]:
        draw = epoch % self._manifest.draws
        temperatures = self._manifest.temperatures
        rows = [r for p in window.parts for r in read_shard(Unit(draw, p).path(self._cache), temperatures)]
        stream = generator(self._seed, epoch, window.first, "rows")
        return rows, list(self._batches([len(r.student_ids) for r in rows], stream))

    def _batches(self, lengths: list[int], stream: np.random.Generator) -> Iterator[list[int]]:
        """Shuffle, then sort by length inside runs of 16 batches, then shuffle the batches."""
        order = stream.permutation(len(lengths))
        span = 16 * self._batch_size
        runs = [order[i : i + span] for i in range(0, len(order), span)]
        by_length = [i for run in runs for i in sorted(run, key=lambda i: lengths[i])]
        batches = [by_length[i : i + self._batch_size] for i in range(0, len(by_length), self._batch_size)]
        return ([int(i) for i in batches[b]] for b in stream.permutation(len(batches)))
