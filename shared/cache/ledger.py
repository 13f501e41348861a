"""What every shard of a cache is: its SHA-256, bytes, rows, positions, chunks. One file, read where training starts.

`ledger.parquet` has all shards of a finished cache. While it is being built each process notes what it writes in a file
of its own (`ledger/HOST-PID.jsonl`), so no two ever write to one; what a killed process did not come to note is found
again from the shard itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shared.cache.manifest import Manifest
from shared.cache.parquet import write_parquet
from shared.cache.shards import Unit, finished_units, read_table, refuse_other_cache
from shared.system.atomic import this_process
from shared.system.errors import TideError

LEDGER = "ledger.parquet"
_NOTES = "ledger"
_NUMBERS = ("bytes", "rows", "masked", "chunks", "rows_without_chunks")


@dataclass(frozen=True)
class Entry:
    """One shard."""

    sha256: str
    bytes: int
    rows: int
    masked: int
    chunks: int
    rows_without_chunks: int

    @classmethod
    def of(cls, content: bytes, counts: Mapping[str, Any]) -> Entry:
        """Of a shard's file, with the counts that are stored in it."""
        numbers = {name: int(counts.get(name, 0)) for name in _NUMBERS if name != "bytes"}
        return cls(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content), **numbers)

    def check(self, path: Path, content: bytes) -> None:
        """TideError where `content` is not that shard's."""
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            raise TideError(
                f"shard {path} is not what the cache's ledger says: SHA-256 {found[:16]}…, {len(content):,} bytes",
                expected=f"{self.sha256[:16]}…, {self.bytes:,} bytes",
                fix="copy it again, or delete it and run the same `tide cache` command: it computes the missing shard",
            )


Ledger = dict[Unit, Entry]


def note(cache: Path, unit: Unit, entry: Entry) -> None:
    """Add a shard that this process has just written."""
    path = cache / _NOTES / f"{this_process()}.jsonl"
    path.parent.mkdir(exist_ok=True)
    line = {"draw": unit.draw, "part": unit.part, "at": time.time(), **dataclasses.asdict(entry)}
    with path.open("a") as handle:
        handle.write(json.dumps(line) + "\n")


def load_ledger(cache: Path, manifest: Manifest) -> Ledger:
    """What is known of the shards of this cache; empty where nothing is. TideError where the ledger is damaged, or that
    of another cache.
    """
    found: Ledger = {}
    path = cache / LEDGER
    if path.exists():
        try:
            table = pq.ParquetFile(path, page_checksum_verification=True).read()
            digest = (table.schema.metadata or {}).get(b"tide.cache", b"").decode()
            found = {
                Unit(row.pop("draw"), row.pop("part")): Entry(**row) for row in table.to_pylist()
            }
        except Exception as error:
            raise TideError(
                f"{path} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}",
                fix=f"delete {path}; `tide verify` makes it anew from the shards",
            ) from error
        if digest != manifest.digest:
            raise TideError(
                f"{path} belongs to another cache ({digest})",
                expected=f"the ledger of {manifest.digest}",
                fix=f"delete {path}; `tide verify` makes it anew from the shards",
            )
    return found | {unit: entry for _, unit, entry in sorted(_notes(cache), key=lambda one: one[0])}


def _notes(cache: Path) -> Iterable[tuple[float, Unit, Entry]]:
    for path in (cache / _NOTES).glob("*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
                yield row.pop("at"), Unit(row.pop("draw"), row.pop("part")), Entry(**row)
            except (ValueError, TypeError, KeyError):  # the last line of a process that was killed
                continue


def settle_ledger(cache: Path, manifest: Manifest) -> Ledger:
    """The ledger of all shards that are there; those that nobody noted are read. Written where the cache is whole."""
    known, here = load_ledger(cache, manifest), finished_units(cache)
    wanted = set(manifest.units())
    found: Ledger = {}
    for unit in here:
        if unit in wanted:
            found[unit] = known.get(unit) or _from_shard(cache, unit, manifest)
    if wanted == set(found):
        save_ledger(cache, manifest, found)
        for path in (cache / _NOTES).glob("*.jsonl"):
            path.unlink(missing_ok=True)
    return found


def _from_shard(cache: Path, unit: Unit, manifest: Manifest) -> Entry:
    path = unit.path(cache)
    content = path.read_bytes()
    shard = read_table(path, None, content)
    refuse_other_cache(path, shard.counts, manifest.digest)
    return Entry.of(content, shard.counts)


def save_ledger(cache: Path, manifest: Manifest, ledger: Ledger) -> None:
    """Write `ledger.parquet`, in the order of the units."""
    rows = [
        {"draw": unit.draw, "part": unit.part, **dataclasses.asdict(ledger[unit])}
        for unit in sorted(ledger)
    ]
    kinds = {
        "draw": pa.int32(),
        "part": pa.int32(),
        "sha256": pa.string(),
        **dict.fromkeys(_NUMBERS, pa.int64()),
    }
    schema = pa.schema(list(kinds.items()), metadata={"tide.cache": manifest.digest})
    table = pa.Table.from_pylist(rows, schema=schema)

    write_parquet(cache / LEDGER, table)


def whole_ledger(cache: Path, manifest: Manifest) -> Ledger:
    """The ledger of a finished cache. TideError where a shard is not there yet."""
    ledger = load_ledger(cache, manifest)
    units = manifest.units()
    if any(unit not in ledger for unit in units):
        ledger = settle_ledger(cache, manifest)
    missing = [unit for unit in units if unit not in ledger]
    if missing:
        raise TideError(
            f"{cache} lacks {len(missing)} of {len(units)} shards, the first is {missing[0].path(cache)}",
            expected="a finished cache",
            fix="run the same `tide cache` command again: it computes what is missing",
        )
    return ledger
