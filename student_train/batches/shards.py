"""Where rows come from: shards of a folder, or of a store from which they are brought as they are needed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from shared.cache.ledger import Ledger
from shared.cache.manifest import Manifest
from shared.cache.row import CacheRow, Layout
from shared.cache.shards import Shard, Unit, read_table
from shared.cache.stores import Store
from shared.cache.value_checks import problems_in
from shared.system.atomic import write_bytes
from shared.system.errors import TideError

_AT_ONCE = 4


@dataclass(frozen=True)
class OpenShard:
    """A shard whose rows are not decoded yet."""

    path: Path
    layout: Layout
    shard: Shard

    @property
    def lengths(self) -> Int[np.ndarray, " rows"]:
        """Tokens of the student, row by row."""
        column: Any = self.shard.table.column("student_ids").combine_chunks()
        return column.value_lengths().to_numpy().astype(np.int64)

    @property
    def examples(self) -> pa.ChunkedArray:
        """The ids of the rows' examples."""
        return self.shard.table.column("example_id")

    def rows(self, chosen: Sequence[int] | None = None) -> list[CacheRow]:
        """All rows, or the chosen ones. TideError where they cannot be decoded."""
        return self.shard.rows(self.path, self.layout, chosen)


@runtime_checkable
class ShardSource(Protocol):
    """Gives the shard of a unit."""

    def shard(self, unit: Unit) -> OpenShard:
        """One shard. TideError where it is not what the ledger says."""
        ...

    def soon(self, units: Sequence[Unit]) -> None:
        """These will be asked for next."""
        ...


class FolderShards:
    """Shards of a folder, whose values were looked at before (`shared.cache.checking`)."""

    def __init__(self, cache: Path, layout: Layout, ledger: Ledger) -> None:
        self._cache, self._layout, self._ledger = cache, layout, ledger

    def shard(self, unit: Unit) -> OpenShard:
        """One shard (see `ShardSource`)."""
        path = unit.path(self._cache)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise TideError(
                f"shard {path} cannot be read: {error.strerror}",
                expected="all shards that the cache's ledger names",
                fix="run the same `tide cache` command again: it computes what is missing",
            ) from error
        self._ledger[unit].check(path, content)
        return OpenShard(path, self._layout, read_table(path, self._layout, content))

    def soon(self, units: Sequence[Unit]) -> None:
        """Nothing to do: files are at hand."""


class StoredShards:
    """Shards of a store, brought ahead into `folder`, which holds `limit` bytes of them and the most recent ones."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        manifest: Manifest,
        layout: Layout,
        ledger: Ledger,
        limit: int,
    ) -> None:
        self._store, self._folder, self._manifest, self._layout = store, folder, manifest, layout
        self._ledger, self._limit = ledger, limit
        self._lock = threading.Lock()
        self._coming: dict[Unit, Future[bytes]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self.fetched = 0
        """Shards that came from the store, for the tests and the benchmark."""

    def __getstate__(self) -> dict[str, object]:
        """Processes that read for one run have threads of their own."""
        return {**self.__dict__, "_lock": None, "_coming": {}, "_pool": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        self._lock = threading.Lock()

    def soon(self, units: Sequence[Unit]) -> None:
        """Begin to bring these."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_AT_ONCE, "fetch")
            for unit in units:
                if unit not in self._coming and not unit.path(self._folder).exists():
                    self._coming[unit] = self._pool.submit(self._fetch, unit)

    def shard(self, unit: Unit) -> OpenShard:
        """One shard (see `ShardSource`)."""
        with self._lock:
            coming = self._coming.pop(unit, None)
        path = unit.path(self._folder)
        content = (
            coming.result() if coming is not None else self._at_hand(unit) or self._fetch(unit)
        )
        shard = read_table(path, self._layout, content)
        problems = problems_in(shard.table, self._layout, self._manifest)
        if problems:
            raise TideError(
                f"shard {path} of {self._store.url} does not hold: {'; '.join(problems)}"
            )
        return OpenShard(path, self._layout, shard)

    def _at_hand(self, unit: Unit) -> bytes | None:
        """The shard's bytes from the folder; None where they are not there, or are not the ledger's."""
        path = unit.path(self._folder)
        try:
            content = path.read_bytes()
            self._ledger[unit].check(path, content)
        except (OSError, TideError):
            return None
        with suppress(OSError):
            path.touch()
        return content

    def _fetch(self, unit: Unit) -> bytes:
        path = unit.path(self._folder)
        content = self._store.read(unit.path(Path()).as_posix())
        self._ledger[unit].check(path, content)
        with (
            self._lock
        ):  # one comes in when another has gone: the folder never holds more than one too many
            write_bytes(path, content)
            self.fetched += 1
            self._make_room()
        return content

    def _make_room(self) -> None:
        """Remove the shards that were used longest ago, until the rest is within the limit."""
        found = []
        for path in self._folder.glob("draw=*/part-*.parquet"):
            with suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found, key=lambda one: one[0])[:-_AT_ONCE]:
            if total <= self._limit:
                break
            path.unlink(missing_ok=True)
            total -= size
