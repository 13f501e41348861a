"""A large cache: what the start of training, a resumed run and the reading of positions take, and
what of it grows.

Shards are made up: one a draw is written, and every part is a link to it, so that a million rows
under four draws take no more room on the disk. The ledger, the tables and the manifest are those of
the full size.
"""

import dataclasses
import os
import tempfile
import time
import timeit
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from rich.table import Table

from pipelines.speed import in_process
from shared.cache import ledger
from shared.cache.manifest import Manifest
from shared.cache.row import Pilot
from shared.cache.shards import TABLES, Unit, read_shard, save_tables, write_shard
from shared.settings.config import CacheConfig, TargetConfig, TrainConfig
from shared.system.hardware import high_water
from student_train.batches.collate import TargetReader, collate
from student_train.batches.loader import BatchDataset, OpenCache
from teacher_cache.run.costs import Workload, even_layout, made_up_fingerprint, random_rows

DRAWS, ROWS, VOCABULARY = 4, 512, 151_936
CONFIG = CacheConfig(targets=TargetConfig(signals=("topk",)))
LOAD = Workload(1, 2, 1024, 150, 300, 0, "")


def bench_loader(sizes: tuple[int, ...] = (10_000, 100_000, 1_000_000)) -> Table:
    """A row a size of cache."""
    targets = CONFIG.targets
    kept = f"k {targets.k}, {targets.classes} classes, {VOCABULARY:,} tokens, {DRAWS} draws"
    columns = ("rows", "shards", "start of training s", "of it ledger s", "memory of it MB",
               "first batch of epoch 9 s", "read positions/s", "to targets", "checked")  # fmt: skip
    table = Table(*columns, title=f"A made-up cache, {kept}; one thread")
    for rows in sizes:
        with tempfile.TemporaryDirectory(prefix="tide-bench-") as folder:
            cache = Path(folder) / "cache"
            shards = make_cache(cache, rows)
            table.add_row(f"{rows:,}", f"{shards:,}", *in_process(measure_cache, cache))
    return table


def make_cache(cache: Path, rows: int) -> int:
    """Write the cache; how many shards it has."""
    layout, none = even_layout(CONFIG.targets, VOCABULARY), np.zeros(0, np.int32)
    tables = layout.vocabulary
    assert tables is not None
    pilot = Pilot(none, none, none.astype(np.float32), np.zeros((0, 2), np.float32))
    centroids = np.zeros((tables.classes, 1), np.float32)
    save_tables(cache / TABLES, tables, pilot, centroids)
    fingerprint = made_up_fingerprint(CONFIG, True, VOCABULARY, 0)
    fingerprint = dataclasses.replace(fingerprint, tables=tables.digest)
    manifest = Manifest(fingerprint, DRAWS, -(-rows // ROWS), rows)
    manifest.save(cache)
    entries = {}
    for draw in range(DRAWS):
        made = random_rows(LOAD, CONFIG, VOCABULARY, ROWS, draw)
        first = Unit(draw, 0).path(cache)
        masked = sum(row.masked.size for row in made)
        counts = {"masked": masked, "cache": manifest.digest, "draw": draw}
        content = write_shard(first, made, layout, counts)
        entry = ledger.Entry.of(content, {**counts, "rows": len(made)})
        for part in range(manifest.parts):
            entries[Unit(draw, part)] = entry
            if part:
                os.link(first, Unit(draw, part).path(cache))
    ledger.save_ledger(cache, manifest, entries)
    ledger.remember(cache)
    return len(entries)


def measure_cache(cache: Path) -> list[str]:
    """The cells of a row. In a process of its own, for its memory."""
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    config = TrainConfig(cache=cache, batch_size=32, epochs=10.0)
    before, started = high_water(), time.perf_counter()
    opened = OpenCache(config)
    data = BatchDataset(opened, config)
    start, memory = time.perf_counter() - started, high_water() - before
    manifest, layout, unit = opened.manifest, opened.layout, Unit(0, 0)
    load = timeit.timeit(lambda: ledger.load_ledger(cache, manifest), number=1)
    resume = timeit.timeit(lambda: data.rows(len(data) - 1), number=1)
    cells = [f"{start:.2f}", f"{load:.2f}", f"{memory / 1e6:.0f}", f"{resume:.2f}"]

    path, job = unit.path(cache), (unit, opened.ledger[unit])
    content, rows = path.read_bytes(), read_shard(path, layout)
    read, part = TargetReader(manifest, layout), rows[:32]
    for count, work in (
        (ROWS, lambda: read_shard(path, layout, content)),
        (len(part), lambda: read(collate(part, manifest))),
        (ROWS, lambda: ledger.inspect_shard(cache, manifest, layout, job)),
    ):
        best = min(timeit.repeat(work, number=1, repeat=5))
        cells.append(f"{LOAD.masked * count / best:,.0f}")
    return cells
