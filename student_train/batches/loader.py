"""From shards to batches: which rows at which step, as a pure function of the seed.

Epoch e trains on draw e mod K and reads nothing else; with `draws_per_step` m > 1 a pass over the
data trains on the next m of the K draws of every example at once, which counts as m epochs. Rows
are shuffled in windows of a few parts, so memory stays bounded and files are read in one go; inside
a window batches hold rows of like length. Every item of the data set is one whole batch, found by
its number alone: resuming at step n means asking for batch n.
"""

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from shared.cache.ledger import refuse_unsound, whole_ledger
from shared.cache.manifest import load_manifest, refuse_unfinished
from shared.cache.row import CacheRow, without_masks
from shared.cache.shards import Shard, Unit, finished_units, read_table
from shared.cache.stores import Store
from shared.cache.value_checks import sound
from shared.diffusion import generator
from shared.settings.config import TrainConfig
from shared.system.files import TideError, read_bytes, write_bytes
from shared.system.processes import serve_parent
from student_train.batches.collate import Batch, collate

_AT_ONCE = 4  # shards on their way from a store


class OpenCache:
    """The cache of `config.cache`, opened. TideError where it is not whole, or not sound.

    Shards of a store (`config.store`) come ahead of their use into its local side, the folder: it
    holds `store_cache_gb` of them, those that were used last.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.folder = config.cache
        self.store = None if config.store is None else Store.open(config.store)
        if self.store is not None:
            self.store.bring(self.folder)
        self.manifest = load_manifest(self.folder)
        self.ledger = whole_ledger(self.folder, self.manifest)
        self.layout = self.manifest.layout(self.folder)
        if self.store is None:
            refuse_unfinished(self.folder, self.manifest)
            if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # torchrun's: the first of its machine
                refuse_unsound(self.folder, self.manifest, self.layout, self.ledger)
        self._limit = round(config.store_cache_gb * 1e9)
        self._coming: dict[Unit, Future[bytes]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, object]:
        """For a process of a DataLoader, which brings shards by threads of its own."""
        return {**self.__dict__, "_coming": {}, "_pool": None}

    def soon(self, units: Sequence[Unit]) -> None:
        """These shards will be asked for next: begin to bring them."""
        if self.store is None:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_AT_ONCE, "fetch")
        for unit in units:
            if unit not in self._coming and not unit.path(self.folder).exists():
                self._coming[unit] = self._pool.submit(self._fetch, self.store, unit)

    def shard(self, unit: Unit) -> Shard:
        """One shard. TideError where it is not what the ledger says."""
        path, store = unit.path(self.folder), self.store
        try:
            content = read_bytes(path) if store is None else self._stored(store, unit)
        except OSError as error:
            what = f"shard {path}, which the cache's ledger names, cannot be read: {error.strerror}"
            fix = "run the same `tide cache` command again: it computes what is missing"
            raise TideError(what, fix=fix) from error
        if store is None:
            shard = read_table(path, self.layout, content)
        else:  # nobody looked at its values when the cache was opened
            shard = sound(path, self.layout, self.manifest, content)
        self.ledger[unit].check(path, content, shard.counts)
        return shard

    def _fetch(self, store: Store, unit: Unit) -> bytes:
        content = store.read(unit.path(Path()).as_posix())
        self.ledger[unit].check(unit.path(self.folder), content)
        return content

    def _stored(self, store: Store, unit: Unit) -> bytes:
        """The bytes of a shard of the store: on their way, at hand, or fetched now."""
        path, coming = unit.path(self.folder), self._coming.pop(unit, None)
        if coming is None:
            with suppress(OSError, TideError):  # missing, or damaged: fetch it again
                content = read_bytes(path)
                self.ledger[unit].check(path, content)
                path.touch()  # used last
                return content
        content = self._fetch(store, unit) if coming is None else coming.result()
        write_bytes(path, content)
        # Remove the shards that were used longest ago, but for a few, until the rest fits.
        present = []
        for other in (held.path(self.folder) for held in finished_units(self.folder)):
            with suppress(OSError):  # another process removed it
                status = other.stat()
                present.append((status.st_mtime_ns, status.st_size, other))
        total = sum(size for _, size, _ in present)
        for _, size, other in sorted(present)[:-_AT_ONCE]:
            if total <= self._limit:
                break
            other.unlink(missing_ok=True)
            total -= size
        return content


class BatchDataset(torch.utils.data.Dataset[Batch]):
    """The batches of a training run: `max_steps` of them, or `epochs` epochs.

    Items are what one process takes at a time. With P processes item i is part i mod P of a batch,
    so a step sees the same rows however many processes share it. With `global_batch` a step is one
    batch, cut into as many parts as passes of all processes see it.
    """

    def __init__(self, cache: OpenCache, config: TrainConfig, processes: int = 1) -> None:
        self._cache, self._manifest = cache, cache.manifest
        self._seed, self._window, self._draws = config.seed, config.window, config.draws_per_step
        tables = cache.layout.tables
        mapped = config.distillation.needs == "topk"
        self._token_map = tables.token_map if mapped and tables is not None else None
        # Rows that examples share are no longer than the longest where attention grows with the
        # square of that. Where it skips other examples, two of the full length fit: longer rows
        # hardly hold less padding.
        full = (config.draws_per_step + 1) * self._manifest.fingerprint.lengths.student
        self._width = 2 * full if config.student.attention == "flex" else 0
        self._parts, batch, steps = processes, config.batch_size, config.max_steps
        if config.global_batch is None:
            steps *= config.accumulation
        else:
            self._parts *= config.accumulation
            batch = config.global_batch // self._parts
        self._batch = batch * self._parts // self._draws  # examples, of all parts together

        self._rows = np.zeros((self._manifest.draws, self._manifest.parts), np.int64)
        for unit in self._manifest.units():
            self._rows[unit.draw, unit.part] = cache.ledger[unit].rows
        if (self._rows.sum(axis=1) == 0).any():
            raise TideError("the cache has no rows", fix="build it from data whose prompts fit")
        # Batches of each pass, until passes come to the same draws again.
        cycle = self._manifest.draws // math.gcd(self._manifest.draws, self._draws)
        examples = np.array([self._rows[self._draws_of(n)[0]].sum() for n in range(cycle)])
        self._batches = -(-examples // self._batch)
        self._total = steps
        if config.max_steps <= 0:
            self._total = math.ceil(config.epochs * self.batches_in(0) / self._draws)
        self._windows: dict[tuple[int, int], Window] = {}

    def __getstate__(self) -> dict[str, object]:
        """For a process that works ahead: without the windows that are open."""
        return {**self.__dict__, "_windows": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if torch.multiprocessing.parent_process() is not None:  # in a process of a DataLoader
            serve_parent(os.getppid())

    def __len__(self) -> int:
        return self._total * self._parts

    def epochs_in(self, items: int) -> float:
        """How many epochs the first `items` items are: one is a draw of every example."""
        return items / self._parts * self._draws / self.batches_in(0)

    def batches_in(self, number: int) -> int:
        """Batches of a pass over the data."""
        return int(self._batches[number % len(self._batches)])

    def __getitem__(self, index: int) -> Batch:
        """Item number `index` of the run.

        In a process of a DataLoader a TideError comes as `{"error": its text}`, to be raised where
        it arrives: PyTorch would put a traceback around it.
        """
        try:
            return collate(self.rows(index), self._manifest, self._token_map, self._width)
        except TideError as error:
            if torch.utils.data.get_worker_info() is None:
                raise
            return {"error": str(error)}

    def rows(self, index: int) -> list[CacheRow]:
        """The rows of item number `index`: of each example its draws, one after the other.

        Where a last batch has fewer examples than parts, some parts get an example that another has
        too, with nothing of it masked.
        """
        # 1. The pass, and the batch's first example in it.
        index, part = divmod(index, self._parts)
        cycle, index = divmod(index, int(self._batches.sum()))
        number = int(np.searchsorted(np.cumsum(self._batches), index, side="right"))
        start = (index - int(self._batches[:number].sum())) * self._batch
        number += cycle * len(self._batches)
        # 2. The examples of this part: every P-th of the batch, from perhaps several windows.
        size = min(self._batch, int(self._rows[self._draws_of(number)[0]].sum()) - start)
        mine = range(start + part, start + size, self._parts)
        starts = self._pass(number)[1]
        places = np.array(mine or [start])
        windows = np.searchsorted(starts, places, side="right") - 1
        rows: list[CacheRow] = []
        for window in np.unique(windows):
            inside = places[windows == window] - starts[window]
            rows += self._opened(number, int(window)).rows(inside.tolist())
        return rows if mine else [without_masks(rows[0])]

    def _draws_of(self, number: int) -> list[int]:
        return [(number * self._draws + j) % self._manifest.draws for j in range(self._draws)]

    def _pass(self, number: int) -> tuple[Int[np.ndarray, " parts"], Int[np.ndarray, " windows"]]:
        """The parts of a pass in their order, and at which example each of its windows begins."""
        parts = generator(self._seed, number, "parts").permutation(self._manifest.parts)
        ends = np.concatenate([[0], np.cumsum(self._rows[self._draws_of(number)[0]][parts])])
        return parts, ends[: len(parts) : self._window]

    def _units(self, number: int, window: int) -> list[list[Unit]]:
        """The units of a window: of each of its parts the draws."""
        parts = self._pass(number)[0][window * self._window : (window + 1) * self._window]
        return [[Unit(draw, int(part)) for draw in self._draws_of(number)] for part in parts]

    def _opened(self, number: int, window: int) -> "Window":
        if (number, window) not in self._windows:
            units = self._units(number, window)
            coming = self._units(number, window + 1) or self._units(number + 1, 0)
            self._cache.soon(list(itertools.chain(*units)))
            begun = int(-self._pass(number)[1][window] % self._batch)
            stream = generator(self._seed, number, window, "rows")
            opened = Window(self._cache, units, begun, self._batch, stream)
            self._cache.soon(list(itertools.chain(*coming)))
            # Two stay open, since a batch may begin in one and end in the next.
            self._windows = dict([*self._windows.items()][-1:])
            self._windows[number, window] = opened
        return self._windows[number, window]


class Window:
    """Some parts of a pass, opened, and the order in which their examples are trained on.

    `units[i]` are the draws of one part; the first `begun` examples fill up the batch that the
    window before has begun.
    """

    def __init__(
        self,
        cache: OpenCache,
        units: Sequence[Sequence[Unit]],
        begun: int,
        batch: int,
        stream: np.random.Generator,
    ) -> None:
        self._cache, self._units = cache, units
        self._shards = [[cache.shard(unit) for unit in draws] for draws in units]
        home, lengths = [], []
        for part, (draws, shards) in enumerate(zip(units, self._shards, strict=True)):
            ids = shards[0].table.column("example_id")
            for unit, shard in zip(draws, shards, strict=True):
                if not shard.table.column("example_id").equals(ids):
                    first, other = draws[0].path(cache.folder), unit.path(cache.folder)
                    what = f"{first} and {other}, two draws of one part, hold other examples"
                    raise TideError(what, fix="train with draws_per_step=1")
            tokens: Any = shards[0].table.column("student_ids").combine_chunks()
            lengths.append(tokens.value_lengths().to_numpy().astype(np.int64))
            home += [(part, row) for row in range(len(ids))]
        # 1. Shuffled. The first `begun` examples stay as they come.
        size = np.concatenate(lengths)
        order = stream.permutation(len(size))
        head, rest = order[:begun], order[begun:]
        # 2. Sorted by length inside runs of 16 batches, so that batches hold such of like length.
        for at in range(0, len(rest), 16 * batch):
            run = rest[at : at + 16 * batch]
            rest[at : at + 16 * batch] = run[np.argsort(size[run], kind="stable")]
        # 3. Whole batches shuffled; what is left over comes last.
        whole = len(rest) // batch * batch
        batches = rest[:whole].reshape(-1, batch)
        mixed = batches[stream.permutation(len(batches))].reshape(-1)
        self._order = [home[i] for i in np.concatenate([head, mixed, rest[whole:]])]

    def rows(self, places: Sequence[int]) -> list[CacheRow]:
        """The rows of the examples at these places of the order, draw by draw."""
        rows_of: dict[int, list[int]] = defaultdict(list)
        for place in places:
            part, row = self._order[place]
            rows_of[part].append(row)
        decoded: dict[tuple[int, int], list[CacheRow]] = defaultdict(list)
        for part, chosen in rows_of.items():
            for unit, shard in zip(self._units[part], self._shards[part], strict=True):
                rows = shard.rows(unit.path(self._cache.folder), self._cache.layout, chosen)
                for number, row in zip(chosen, rows, strict=True):
                    decoded[part, number].append(row)
        return [row for place in places for row in decoded[self._order[place]]]
