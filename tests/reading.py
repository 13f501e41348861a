"""Rows of caches, as tests look at them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shared.cache.manifest import load_manifest
from shared.cache.row import CacheRow, Layout, Tables
from shared.cache.shards import Unit, finished_units, read_table, write_table
from shared.settings.config import TrainConfig
from student_train.batches.loader import BatchDataset, OpenCache


def layout_of(cache: Path) -> Layout:
    """How the cache's shards are read."""
    return load_manifest(cache).layout(cache)


def read_shard(path: Path, layout: Layout) -> list[CacheRow]:
    """All rows of a shard's file."""
    return read_table(path, layout).rows(path, layout)


def rows_in(cache: Path, unit: Unit) -> list[CacheRow]:
    """The rows of one shard."""
    return read_shard(unit.path(cache), layout_of(cache))


def all_rows(cache: Path) -> list[CacheRow]:
    """The rows of every shard that is there."""
    layout = layout_of(cache)
    return [row for unit in finished_units(cache) for row in read_shard(unit.path(cache), layout)]


def dataset(cache: Path, processes: int = 1, **changes: object) -> BatchDataset:
    """Batches of a cache."""
    values: dict = {"batch_size": 5, "seed": 3, "epochs": 4.0, **changes}
    config = TrainConfig(cache=cache, **values)
    return BatchDataset(OpenCache(config), config, processes)


def change_column(cache: Path, unit: Unit, name: str, column: pa.Array) -> None:
    """Put another column into a shard, with checksums and counts that hold."""
    layout, path = layout_of(cache), unit.path(cache)
    shard = read_table(path, layout)
    place = shard.table.schema.get_field_index(name)
    field = shard.table.schema.field(place)
    counts = {key: value for key, value in shard.counts.items() if key != "rows"}
    write_table(path, shard.table.set_column(place, field, column.cast(field.type)), layout, counts)


def same_values(column: pa.Array, values: pa.Array) -> pa.Array:
    """A list column with other values and the same lengths."""
    return pa.ListArray.from_arrays(column.offsets, values)


def plain_table(path: Path) -> pa.Table:
    """A shard as Parquet gives it."""
    return pq.ParquetFile(path).read()


def random_tables(
    vocabulary: int, width: int, rank: int, step: float = 0.05, temperatures: int = 2
) -> Tables:
    """Tables of a teacher that there is not, in which every id is shared."""
    rng = np.random.default_rng(rank)
    floats = rng.standard_normal
    return Tables(
        rank_of=rng.permutation(vocabulary).astype(np.int32),
        shared=np.ones(vocabulary, bool),
        mean=floats(vocabulary).astype(np.float32),
        calibration=floats((temperatures, vocabulary)).astype(np.float32),
        directions=rng.integers(-127, 128, (vocabulary, rank), np.int8),
        scales=rng.random(rank).astype(np.float32) / 50,
        encoder=floats((rank, width)).astype(np.float32),
        center=floats(width).astype(np.float32),
        step=step,
    )
