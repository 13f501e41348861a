"""A finished cache made ready for training: one file says what it holds; no shard is read that passed before."""

from __future__ import annotations

from dataclasses import dataclass

from shared.cache.checking import refuse_unsound
from shared.cache.ledger import Ledger, whole_ledger
from shared.cache.manifest import Manifest, load_manifest, refuse_unfinished
from shared.cache.row import Layout
from shared.cache.stores import Store
from shared.settings.config import TrainConfig
from shared.system.processes import first_here
from student_train.batches.loader import BatchDataset
from student_train.batches.shards import FolderShards, ShardSource, StoredShards


@dataclass(frozen=True)
class OpenCache:
    """What a cache is, and where its rows come from."""

    manifest: Manifest
    layout: Layout
    ledger: Ledger
    source: ShardSource
    store: Store | None = None

    def batches(self, config: TrainConfig, processes: int = 1) -> BatchDataset:
        """The batches of a run. With `global_batch` a step is one batch, cut into as many parts as passes see it."""
        parts, steps = processes, config.max_steps * config.accumulation
        if config.global_batch is not None:
            parts, steps = processes * config.accumulation, config.max_steps
        return BatchDataset(
            self.manifest,
            self.ledger,
            self.source,
            batch_size=config.batch_size
            if config.global_batch is None
            else config.global_batch // parts,
            seed=config.seed,
            epochs=config.epochs,
            total=steps if config.max_steps > 0 else None,
            window=config.window,
            processes=parts,
            draws=config.draws_per_step,
        )


def open_cache(config: TrainConfig) -> OpenCache:
    """Open `config.cache`, or the store whose local side it is. TideError where it is not whole, or does not hold."""
    cache = config.cache
    if config.store is not None:
        store = Store.open(config.store)
        store.bring(cache)
        manifest = load_manifest(cache)
        layout, ledger = manifest.layout(cache), whole_ledger(cache, manifest)
        limit = round(config.store_cache_gb * 1e9)
        source = StoredShards(store, cache, manifest, layout, ledger, limit)
        return OpenCache(manifest, layout, ledger, source, store)
    manifest = load_manifest(cache)
    layout, ledger = manifest.layout(cache), whole_ledger(cache, manifest)
    refuse_unfinished(cache, manifest)
    if first_here():
        refuse_unsound(cache, manifest, layout, ledger)
    return OpenCache(manifest, layout, ledger, FolderShards(cache, layout, ledger))
