"""A large cache: what the start of training, a batch and the reading of positions take, and what of it grows.

Shards are made up: one a draw is written, and every part is a link to it, so that a million rows under four draws take
no more room on the disk. The ledger, the tables and the manifest are those of the full size.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from rich.table import Table

from shared.cache.checking import inspect_shard, remember
from shared.cache.ledger import Entry, load_ledger, save_ledger
from shared.cache.manifest import Manifest, load_manifest
from shared.cache.row import Layout
from shared.cache.shards import Unit, read_shard, write_shard
from shared.cache.vocabulary import TABLES, Pilot, Vocabulary, save_tables
from shared.settings.config import CacheConfig, TargetConfig, TrainConfig
from student_train.batches.collate import TargetReader, collate
from student_train.batches.loader import BatchDataset
from student_train.batches.open_cache import open_cache
from teacher_cache.run.costs import Workload, made_up_fingerprint, random_rows

_DRAWS, _ROWS, _VOCABULARY = 4, 512, 151_936
_SIZES = (10_000, 100_000, 1_000_000)
_CONFIG = CacheConfig(targets=TargetConfig(signals=("topk",)))
_LOAD = Workload(1, 2, 1024, 150, 300, 0, "")


def bench_large_cache() -> Table:
    """The numbers as a table."""
    targets = _CONFIG.targets
    kept = f"k {targets.k}, {targets.classes} classes, {_VOCABULARY:,} tokens, {_DRAWS} draws"
    names = ("rows", "shards", "start of training s", "of it ledger s", "memory of it MB", "first batch of epoch 9 s",
             "read positions/s", "to targets", "checked")  # fmt: skip
    table = Table(*names, title=f"A made-up cache, {kept}; one thread")
    for rows in _SIZES:
        with tempfile.TemporaryDirectory(prefix="tide-bench-large-") as folder:
            cache = Path(folder) / "cache"
            shards = _make(cache, rows)
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            process = multiprocessing.get_context("spawn").Process(
                target=_measure, args=(cache, theirs)
            )
            process.start()
            theirs.close()
            found = ours.recv()
            process.join()
            table.add_row(f"{rows:,}", f"{shards:,}", *found)
    return table


def _make(cache: Path, rows: int) -> int:
    """Write the cache; how many shards it has."""
    targets, parts = _CONFIG.targets, -(-rows // _ROWS)
    classes = (np.arange(_VOCABULARY) % targets.classes).astype(np.int32)
    prior = np.full((2, _VOCABULARY), 1 / _VOCABULARY, np.float32)
    vocabulary = Vocabulary(classes, np.arange(_VOCABULARY, dtype=np.int32), prior)
    none = np.zeros(0, np.int32)
    pilot = Pilot(none, none, none.astype(np.float32), np.zeros((0, 2), np.float32))
    save_tables(cache / TABLES, vocabulary, pilot, np.zeros((targets.classes, 1), np.float32))
    fingerprint = dataclasses.replace(
        made_up_fingerprint(_CONFIG, True, _VOCABULARY, 0), tables=vocabulary.digest
    )
    manifest = Manifest(fingerprint, _DRAWS, parts, rows)
    manifest.save(cache)
    layout, ledger = Layout((1.0, 2.0), "levels", vocabulary), {}
    for draw in range(_DRAWS):
        made = random_rows(_LOAD, _CONFIG, _VOCABULARY, _ROWS, draw)
        first = Unit(draw, 0).path(cache)
        counts = {
            "masked": sum(row.masked.size for row in made),
            "cache": manifest.digest,
            "draw": draw,
        }
        content = write_shard(first, made, layout, counts)
        entry = Entry.of(content, {**counts, "rows": len(made)})
        for part in range(parts):
            ledger[Unit(draw, part)] = entry
            if part:
                os.link(first, Unit(draw, part).path(cache))
    save_ledger(cache, manifest, ledger)
    remember(cache)
    return len(ledger)


def _measure(cache: Path, result: Connection) -> None:
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    before = _resident()
    started = time.perf_counter()
    opened = open_cache(TrainConfig(cache=cache, batch_size=32, epochs=10.0))
    data = BatchDataset(opened, TrainConfig(batch_size=32, epochs=10.0))
    start = time.perf_counter() - started
    memory = _resident() - before
    manifest = load_manifest(cache)
    started = time.perf_counter()
    load_ledger(cache, manifest)
    ledger = time.perf_counter() - started
    started = time.perf_counter()
    data.rows(len(data) - 1)
    find = time.perf_counter() - started
    path = Unit(0, 0).path(cache)
    content = path.read_bytes()
    speeds = [_positions(lambda: read_shard(path, opened.layout, content))]
    rows = read_shard(path, opened.layout)
    read = TargetReader(manifest, opened.layout)
    speeds.append(_positions(lambda: read(collate(rows[:32], manifest)), 32 / _ROWS))
    job = (Unit(0, 0), opened.ledger[Unit(0, 0)])
    speeds.append(_positions(lambda: inspect_shard(cache, manifest, opened.layout, job)))
    cells = [f"{start:.2f}", f"{ledger:.2f}", f"{memory:.0f}", f"{find:.2f}"]
    result.send([*cells, *(f"{speed:,.0f}" for speed in speeds)])


def _resident() -> float:
    """Megabytes that this process holds (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _positions(work: Callable[[], object], share: float = 1.0) -> float:
    """Positions a second, the best of five."""
    best = 1e9
    for _ in range(5):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return share * _ROWS * _LOAD.masked / best
