"""What every shard of a cache is, and whether it still is: its bytes, and its values by the rules.

`ledger.parquet` has all shards of a finished cache. While it is being built each process notes what
it writes in a file of its own (`ledger/HOST-PID.jsonl`), so no two ever write to one; what a killed
process did not come to note is found again from the shard itself. `checked.json` says that a cache
passed here: as long as its ledger is this very file, which no other machine can name, its shards
are what they were.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pydantic import TypeAdapter
from tqdm.auto import tqdm

from shared.cache.manifest import Manifest, refuse_unfinished
from shared.cache.row import Layout
from shared.cache.shards import Unit, finished_units, read_parquet, read_table, write_parquet
from shared.cache.value_checks import VERSION, sound
from shared.settings.build import differences
from shared.system.files import TideError, read_bytes, read_json, this_process, write_bytes
from shared.system.processes import serve_parent

Content = bytes  # of a file: `Entry` has a field of the other name
LEDGER, CHECKED = "ledger.parquet", "checked.json"
NOTES = "ledger"
_NUMBERS = ("bytes", "rows", "masked", "chunks", "rows_without_chunks")
_SHARDS_A_PROCESS = 64
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Entry:
    sha256: str
    bytes: int
    rows: int
    masked: int
    chunks: int
    rows_without_chunks: int

    @classmethod
    def of(cls, content: Content, counts: Mapping[str, Any]) -> "Entry":
        """From a shard's file, with the counts that are stored in it."""
        numbers = {name: int(counts.get(name, 0)) for name in _NUMBERS if name != "bytes"}
        return cls(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content), **numbers)

    def check(self, path: Path, content: Content, counts: Mapping[str, Any] | None = None) -> None:
        """TideError where `content` is not that shard's, or the `counts` that it has are not."""
        found = Entry.of(content, vars(self) if counts is None else counts)
        if found.sha256 != self.sha256 or (counts is not None and found != self):
            lines = "; ".join(differences(vars(self), vars(found)))
            what = f"shard {path} is not what the cache's ledger says (ledger → shard): {lines}"
            fix = "copy it again, or delete it and run the same `tide cache` command again"
            raise TideError(what, fix=fix)


Ledger = dict[Unit, Entry]
_UNIT, _ENTRY = TypeAdapter(Unit), TypeAdapter(Entry)


def _read_line(line: Any) -> tuple[float, Unit, Entry]:
    """When it was noted, and what. TypeError, ValueError or KeyError for anything else."""
    values = dict(line)
    unit = _UNIT.validate_python({name: values.pop(name) for name in ("draw", "part")})
    return float(values.pop("at", 0)), unit, _ENTRY.validate_python(values)


def note(cache: Path, unit: Unit, entry: Entry) -> None:
    """Add a shard that this process has just written."""
    path = cache / NOTES / f"{this_process()}.jsonl"
    path.parent.mkdir(exist_ok=True)
    line = {**vars(unit), "at": time.time(), **vars(entry)}
    with path.open("a") as handle:
        handle.write(json.dumps(line) + "\n")


def load_ledger(cache: Path, manifest: Manifest) -> Ledger:
    """What is known of the shards of this cache; empty where nothing is.

    TideError where the ledger is damaged, or that of another cache.
    """
    ledger: Ledger = {}
    path = cache / LEDGER
    if path.exists():
        fix = f"delete {path}; `tide verify` makes it anew from the shards"
        table = read_parquet(path, fix)
        digest = (table.schema.metadata or {}).get(b"tide.cache", b"").decode(errors="replace")
        if digest != manifest.digest:
            expected = f"the ledger of {manifest.digest}"
            raise TideError(
                f"{path} belongs to another cache ({digest})", expected=expected, fix=fix
            )
        try:
            ledger = {unit: entry for _, unit, entry in map(_read_line, table.to_pylist())}
        except (TypeError, ValueError, KeyError) as error:
            raise TideError(f"{path} has other columns: {error}", fix=fix) from error
    # The newest note of a shard counts.
    noted = []
    for file in (cache / NOTES).glob("*.jsonl"):
        for line in read_bytes(file).splitlines():
            # the last line of a process that was killed
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                noted.append(_read_line(json.loads(line)))
    for _, unit, entry in sorted(noted, key=lambda one: one[0]):
        ledger[unit] = entry
    return ledger


def entry_of(path: Path, content: bytes, manifest: Manifest) -> Entry:
    """The entry of a shard that nobody noted.

    TideError where it is damaged, or of another cache.
    """
    return Entry.of(content, read_table(path, None, content, manifest.digest).counts)


def settle_ledger(cache: Path, manifest: Manifest) -> Ledger:
    """The ledger of all shards that are there; written where the cache is whole."""
    known = load_ledger(cache, manifest)
    wanted = set(manifest.units())
    ledger: Ledger = {}
    for unit in finished_units(cache):
        if unit in wanted:
            path = unit.path(cache)
            ledger[unit] = known.get(unit) or entry_of(path, read_bytes(path), manifest)
    notes = [*(cache / NOTES).glob("*.jsonl")]
    if wanted == set(ledger) and (notes or ledger != known):
        save_ledger(cache, manifest, ledger)
        for file in notes:
            file.unlink(missing_ok=True)
    return ledger


def save_ledger(cache: Path, manifest: Manifest, ledger: Ledger) -> None:
    """Write `ledger.parquet`, in the order of the units."""
    rows = [{**vars(unit), **vars(ledger[unit])} for unit in sorted(ledger)]
    kinds = {"draw": pa.int32(), "part": pa.int32(), "sha256": pa.string()}
    kinds |= dict.fromkeys(_NUMBERS, pa.int64())
    schema = pa.schema(list(kinds.items()), metadata={"tide.cache": manifest.digest})
    write_parquet(cache / LEDGER, pa.Table.from_pylist(rows, schema=schema))


def whole_ledger(cache: Path, manifest: Manifest) -> Ledger:
    """The ledger of a finished cache. TideError where a shard is not there yet."""
    ledger = load_ledger(cache, manifest)
    if not ledger.keys() >= set(manifest.units()):
        ledger = settle_ledger(cache, manifest)
    refuse_unfinished(cache, manifest, ledger)
    return ledger


def inspect_shard(
    cache: Path, manifest: Manifest, layout: Layout, job: tuple[Unit, Entry | None]
) -> tuple[int, str | None, Path]:
    """One shard's rows, what is wrong with it, and in which file; damage is no error here."""
    unit, entry = job
    path = unit.path(cache)
    try:
        content = read_bytes(path)
        if entry is not None:
            entry.check(path, content)
        shard = sound(path, layout, manifest, content)
        if entry is not None and entry != Entry.of(content, shard.counts):
            return 0, f"the ledger has other counts of {path} than it holds", cache / LEDGER
        return shard.counts["rows"], None, path
    except TideError as error:
        return 0, error.what, path
    except OSError as error:
        return 0, f"shard {path} cannot be read: {error}", path


def in_processes(work: Callable[[T], R], jobs: Sequence[T], word: str) -> Iterator[R]:
    """`work` on every job, in their order: here where they are few, else one process a core."""
    count = min(os.cpu_count() or 1, -(-len(jobs) // _SHARDS_A_PROCESS))
    with contextlib.ExitStack() as held:
        results = map(work, jobs)
        if count > 1:
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(count, spawn, serve_parent, (os.getpid(),))
            results = held.enter_context(pool).map(work, jobs, chunksize=4)
        yield from tqdm(results, total=len(jobs), unit="shard", desc=word, leave=False)


def check_shards(
    cache: Path, manifest: Manifest, layout: Layout, ledger: Ledger, units: Sequence[Unit]
) -> Iterator[tuple[int, str | None, Path]]:
    """`inspect_shard` for each unit, in order."""
    jobs = [(unit, ledger.get(unit)) for unit in units]
    return in_processes(partial(inspect_shard, cache, manifest, layout), jobs, "check")


def _passing(cache: Path) -> dict[str, object]:
    """What `checked.json` says of a cache that passed: this very ledger, under these very rules."""
    status = (cache / LEDGER).stat()
    return {"ledger": [status.st_ino, status.st_ctime_ns], "rules": VERSION}


def remember(cache: Path) -> None:
    """Note that the cache passed."""
    with contextlib.suppress(TideError, OSError):  # one that cannot be written to is looked at anew
        write_bytes(cache / CHECKED, json.dumps(_passing(cache)).encode())


def refuse_unsound(cache: Path, manifest: Manifest, layout: Layout, ledger: Ledger) -> None:
    """TideError where a shard of a finished cache cannot be trained on.

    Values that passed once are not looked at again: then every shard must be there in its length,
    and its hash is compared when it is read.
    """
    units = manifest.units()
    try:
        known = read_json(cache / CHECKED) == _passing(cache)
    except (OSError, ValueError):
        known = False
    problems = []
    if known:
        for unit in units:
            path = unit.path(cache)
            if not path.is_file() or path.stat().st_size != ledger[unit].bytes:
                problems.append(f"{path} is missing, or not as long as the ledger says")
    else:
        checks = check_shards(cache, manifest, layout, ledger, units)
        problems += [problem for _, problem, _ in checks if problem]
    if problems:
        raise TideError(
            f"{len(problems)} of {len(units)} shards of {cache} do not hold; {problems[0]}",
            expected="shards as `tide cache` writes them",
            fix=f"`tide verify --cache {cache} --rows 0 --delete-damaged` lists and removes them; "
            "the same `tide cache` command then computes them again",
        )
    if not known:
        remember(cache)
