"""What every shard of a cache is: its SHA-256, bytes, rows, positions, chunks.

`ledger.parquet` has all shards of a finished cache. While it is being built each process notes what
it writes in a file of its own (`ledger/HOST-PID.jsonl`), so no two ever write to one; what a killed
process did not come to note is found again from the shard itself.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from shared.cache.manifest import Manifest
from shared.cache.parquet import read_parquet, write_parquet
from shared.cache.shards import Unit, finished_units, read_table, refuse_other_cache
from shared.system.errors import TideError
from shared.system.files import this_process

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
    def of(cls, content: bytes, counts: Mapping[str, Any]) -> "Entry":
        """From a shard's file, with the counts that are stored in it."""
        numbers = {name: int(counts.get(name, 0)) for name in _NUMBERS if name != "bytes"}
        return cls(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content), **numbers)

    def check(self, path: Path, content: bytes) -> None:
        """TideError where `content` is not that shard's."""
        digest = hashlib.sha256(content).hexdigest()
        if digest != self.sha256:
            raise TideError(
                f"shard {path} is not what the cache's ledger says: "
                f"SHA-256 {digest[:16]}…, {len(content):,} bytes",
                expected=f"{self.sha256[:16]}…, {self.bytes:,} bytes",
                fix="copy it again, or delete it and run the same `tide cache` command again",
            )


Ledger = dict[Unit, Entry]


def note(cache: Path, unit: Unit, entry: Entry) -> None:
    """Add a shard that this process has just written."""
    path = cache / _NOTES / f"{this_process()}.jsonl"
    path.parent.mkdir(exist_ok=True)
    line = {**dataclasses.asdict(unit), "at": time.time(), **dataclasses.asdict(entry)}
    with path.open("a") as handle:
        handle.write(json.dumps(line) + "\n")


def load_ledger(cache: Path, manifest: Manifest) -> Ledger:
    """What is known of the shards of this cache; empty where nothing is.

    TideError where the ledger is damaged, or that of another cache.
    """
    ledger: Ledger = {}
    path = cache / LEDGER
    fix = f"delete {path}; `tide verify` makes it anew from the shards"
    if path.exists():
        table = read_parquet(path, fix)
        digest = (table.schema.metadata or {}).get(b"tide.cache", b"").decode(errors="replace")
        if digest != manifest.digest:
            raise TideError(
                f"{path} belongs to another cache ({digest})",
                expected=f"the ledger of {manifest.digest}",
                fix=fix,
            )
        try:
            for row in table.to_pylist():
                unit = Unit(row.pop("draw"), row.pop("part"))
                ledger[unit] = Entry(**row)
        except (TypeError, KeyError) as error:
            raise TideError(f"{path} has other columns: {error}", fix=fix) from error
    # The newest note of a shard counts.
    noted: list[tuple[float, Unit, Entry]] = []
    for file in (cache / _NOTES).glob("*.jsonl"):
        for line in file.read_text().splitlines():
            try:
                row = json.loads(line)
                unit = Unit(row.pop("draw"), row.pop("part"))
                noted.append((row.pop("at"), unit, Entry(**row)))
            except (ValueError, TypeError, KeyError):  # the last line of a process that was killed
                continue
    for _, unit, entry in sorted(noted, key=lambda one: one[0]):
        ledger[unit] = entry
    return ledger


def entry_of(path: Path, content: bytes, manifest: Manifest) -> Entry:
    """The entry of a shard that nobody noted.

    TideError where it is damaged, or of another cache.
    """
    counts = read_table(path, None, content).counts
    refuse_other_cache(path, counts, manifest.digest)
    return Entry.of(content, counts)


def settle_ledger(cache: Path, manifest: Manifest) -> Ledger:
    """The ledger of all shards that are there; written where the cache is whole."""
    known = load_ledger(cache, manifest)
    wanted = set(manifest.units())
    ledger: Ledger = {}
    for unit in finished_units(cache):
        if unit in wanted:
            path = unit.path(cache)
            ledger[unit] = known.get(unit) or entry_of(path, path.read_bytes(), manifest)
    if wanted == set(ledger):
        save_ledger(cache, manifest, ledger)
        for file in (cache / _NOTES).glob("*.jsonl"):
            file.unlink(missing_ok=True)
    return ledger


def save_ledger(cache: Path, manifest: Manifest, ledger: Ledger) -> None:
    """Write `ledger.parquet`, in the order of the units."""
    units = sorted(ledger)
    rows = [{**dataclasses.asdict(unit), **dataclasses.asdict(ledger[unit])} for unit in units]
    kinds = {"draw": pa.int32(), "part": pa.int32(), "sha256": pa.string()}
    kinds |= dict.fromkeys(_NUMBERS, pa.int64())
    schema = pa.schema(list(kinds.items()), metadata={"tide.cache": manifest.digest})
    write_parquet(cache / LEDGER, pa.Table.from_pylist(rows, schema=schema))


def whole_ledger(cache: Path, manifest: Manifest) -> Ledger:
    """The ledger of a finished cache. TideError where a shard is not there yet."""
    ledger = load_ledger(cache, manifest)
    units = manifest.units()
    if any(unit not in ledger for unit in units):
        ledger = settle_ledger(cache, manifest)
    missing = [unit for unit in units if unit not in ledger]
    if missing:
        raise TideError(
            f"{cache} lacks {len(missing)} of {len(units)} shards, "
            f"the first is {missing[0].path(cache)}",
            expected="a finished cache",
            fix="run the same `tide cache` command again: it computes what is missing",
        )
    return ledger
