"""A finished cache opened for training: what it holds, and its shards, from a folder or a store."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from shared.cache.checking import refuse_unsound
from shared.cache.ledger import Ledger, whole_ledger
from shared.cache.manifest import Manifest, load_manifest, refuse_unfinished
from shared.cache.shards import Shard, Unit, read_table
from shared.cache.stores import Store
from shared.cache.value_checks import problems_in
from shared.settings.config import TrainConfig
from shared.system.errors import TideError
from shared.system.files import write_bytes
from shared.system.hardware import first_here

_AT_ONCE = 4  # shards on their way from a store


def open_cache(config: TrainConfig) -> "OpenCache":
    """Open `config.cache`, or the store whose local side it is.

    One file, the ledger, says what it holds; no shard is read that passed before. TideError where
    the cache is not whole, or its values do not hold.
    """
    folder, store = config.cache, None
    if config.store is not None:
        store = Store.open(config.store)
        store.bring(folder)
    manifest = load_manifest(folder)
    opened = OpenCache(
        folder, manifest, whole_ledger(folder, manifest), store, round(config.store_cache_gb * 1e9)
    )
    if store is None:
        refuse_unfinished(folder, manifest)
        if first_here():
            refuse_unsound(folder, manifest, opened.layout, opened.ledger)
    return opened


class OpenCache:
    """What a cache is, and its shards.

    Shards of a store are brought ahead of their use into `folder`, which holds `limit` bytes of
    them, those that were used last.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, ledger: Ledger, store: Store | None, limit: int
    ) -> None:
        self.folder, self.manifest, self.ledger = folder, manifest, ledger
        self.layout = manifest.layout(folder)
        self.store, self._limit = store, limit
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
                self._coming[unit] = self._pool.submit(self._fetch, unit)

    def shard(self, unit: Unit) -> Shard:
        """One shard. TideError where it is not what the ledger says."""
        path = unit.path(self.folder)
        if self.store is not None:
            shard = read_table(path, self.layout, self._stored(unit))
            # Nobody looked at these values when the cache was opened.
            problems = problems_in(shard.table, self.layout, self.manifest)
            if problems:
                place = f"shard {path} of {self.store.url}"
                raise TideError(f"{place} does not hold: {'; '.join(problems)}")
            return shard
        try:
            content = path.read_bytes()
        except OSError as error:
            raise TideError(
                f"shard {path} cannot be read: {error.strerror}",
                expected="all shards that the cache's ledger names",
                fix="run the same `tide cache` command again: it computes what is missing",
            ) from error
        self.ledger[unit].check(path, content)
        return read_table(path, self.layout, content)

    def _fetch(self, unit: Unit) -> bytes:
        assert self.store is not None
        content = self.store.read(unit.path(Path()).as_posix())
        self.ledger[unit].check(unit.path(self.folder), content)
        return content

    def _stored(self, unit: Unit) -> bytes:
        """The bytes of a shard of the store: on their way, at hand, or fetched now."""
        path, coming = unit.path(self.folder), self._coming.pop(unit, None)
        if coming is None:
            with suppress(OSError, TideError):  # missing, or damaged: fetch it again
                content = path.read_bytes()
                self.ledger[unit].check(path, content)
                path.touch()  # used last
                return content
        content = self._fetch(unit) if coming is None else coming.result()
        write_bytes(path, content)
        # Remove the shards that were used longest ago, but for a few, until the rest fits.
        present = []
        for other in self.folder.glob("draw=*/part-*.parquet"):
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
