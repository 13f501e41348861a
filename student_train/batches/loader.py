"""From shards to batches: which rows at which step, as a pure function of the seed (DESIGN §6).

Epoch e trains on draw e mod K and reads nothing else; with `draws` m > 1 a pass over the data trains on the next m of
the K draws of every example at once, which counts as m epochs. Rows are shuffled in windows of a few shards, so memory
stays bounded and files are read in one go; inside a window batches hold rows of like length. Every item of the data
set is one whole batch, found by its number alone: resuming at step n means asking for batch n.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from shared.cache.ledger import Ledger
from shared.cache.manifest import Manifest
from shared.cache.row import CacheRow, without_masks
from shared.cache.shards import Unit
from shared.diffusion.noise import generator
from shared.system.errors import TideError
from student_train.batches.collate import Batch, collate
from student_train.batches.shards import ShardSource
from student_train.batches.windows import Window

ERROR = "error"


def refuse_error(batch: Batch) -> None:
    """TideError where one stands in the batch's place."""
    if ERROR in batch:
        raise TideError(batch[ERROR])


@dataclass(frozen=True)
class _Pass:
    """The parts of a pass over the data in their order, window by window, and at which example each window begins."""

    draws: tuple[int, ...]
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
        draws: int = 1,
    ) -> None:
        self._manifest, self._source = manifest, source
        self._seed, self._window, self._draws = seed, window, draws
        self._batch, self._processes = batch_size * processes // draws, processes
        """Examples of a batch, of all processes together."""
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
        cycle = manifest.draws // math.gcd(manifest.draws, draws)
        self._batches = np.array(
            [-(-int(self._rows[self._draws_of(n)[0]].sum()) // self._batch) for n in range(cycle)]
        )
        """Batches of each pass, until passes come to the same draws again."""
        self._remember()
        self._total = total if total is not None else math.ceil(epochs * self.batches_in(0) / draws)

    def _remember(self) -> None:
        self._pass_cached = lru_cache(maxsize=2)(self._pass)
        self._window_cached = lru_cache(maxsize=2)(self._open_window)

    def __getstate__(self) -> dict[str, object]:
        """For a process that works ahead: without the windows that are open here."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_pass_cached", "_window_cached")
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        self._remember()

    def epochs_in(self, items: int) -> float:
        """How many epochs the first `items` items are: one is a draw of every example."""
        return items / self._processes * self._draws / self.batches_in(0)

    def batches_in(self, number: int) -> int:
        """Batches of a pass over the data: of an epoch, or of as many as draws are trained on at once."""
        return int(self._batches[number % len(self._batches)])

    def _draws_of(self, number: int) -> tuple[int, ...]:
        return tuple((number * self._draws + j) % self._manifest.draws for j in range(self._draws))

    def _pass(self, number: int) -> _Pass:
        draws = self._draws_of(number)
        parts = generator(self._seed, number, "parts").permutation(self._manifest.parts)
        ends = np.concatenate([[0], np.cumsum(self._rows[draws[0]][parts])])
        return _Pass(draws, parts, ends[: len(parts) : self._window])

    def __len__(self) -> int:
        return self._total * self._processes

    def __getitem__(self, index: int) -> Batch:
        """Item number `index` of the run. In a process of a DataLoader a TideError comes as `{"error": its text}`, for
        `refuse_error` to raise where it arrives: PyTorch would put a traceback around it.
        """
        try:
            return collate(self.rows(index), self._manifest)
        except TideError as error:
            if torch.utils.data.get_worker_info() is None:
                raise
            return {ERROR: str(error)}

    def rows(self, index: int) -> list[CacheRow]:
        """The rows of item number `index`. Where a last batch has fewer examples than processes, some get one that
        another has too, with nothing of it masked.
        """
        index, part = divmod(index, self._processes)
        cycle, index = divmod(index, int(self._batches.sum()))
        number = int(np.searchsorted(np.cumsum(self._batches), index, side="right"))
        start = (index - int(self._batches[:number].sum())) * self._batch
        number += cycle * len(self._batches)
        size = min(self._batch, int(self._rows[self._draws_of(number)[0]].sum()) - start)
        mine = self._examples(number, [start + i for i in range(part, size, self._processes)])
        if not mine:
            return [without_masks(self._examples(number, [start])[0][0])]
        return [row for draws in mine for row in draws]

    def _examples(self, number: int, places: list[int]) -> list[list[CacheRow]]:
        """Examples of a pass by their place in it: of one window, or of some that follow each other."""
        starts = self._pass_cached(number).starts
        found: list[list[CacheRow]] = []
        while len(found) < len(places):
            window = int(np.searchsorted(starts, places[len(found)], side="right")) - 1
            opened, begin = self._window_cached(number, window), int(starts[window])
            own = [place - begin for place in places[len(found) :] if place - begin < len(opened)]
            found += opened.examples(own)
        return found

    def _units(self, number: int, window: int) -> list[list[Unit]]:
        """The units of a window, part by part."""
        here = self._pass_cached(number)
        chosen = here.parts[window * self._window : (window + 1) * self._window]
        return [[Unit(draw, int(part)) for draw in here.draws] for part in chosen]

    def _open_window(self, number: int, window: int) -> Window:
        units = self._units(number, window)
        self._soon(units)
        shards = [[self._source.shard(unit) for unit in draws] for draws in units]
        self._soon(self._units(number, window + 1) or self._units(number + 1, 0))
        begin = int(self._pass_cached(number).starts[window])
        stream = generator(self._seed, number, window, "rows")
        return Window(shards, begin, self._batch, self._processes, stream)

    def _soon(self, units: list[list[Unit]]) -> None:
        self._source.soon([unit for draws in units for unit in draws])
