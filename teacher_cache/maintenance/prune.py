"""`tide prune`: a cache with fewer logits a position, fewer classes or fewer draws, from a finished one.

What is outside of the new top-k joins the tail: its mass is added to that of its class, and to the prior, which the
pilot sample gives for every k. Fewer classes are classes of classes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm import tqdm

from shared.cache.ledger import Entry, note, settle_ledger
from shared.cache.levels import EMPTY, LARGEST_ODDS, class_log_mass
from shared.cache.manifest import Manifest
from shared.cache.row import CacheRow, Layout
from shared.cache.shards import CACHE, finished_units, read_table, write_shard
from shared.cache.vocabulary import (
    TABLES,
    Pilot,
    Vocabulary,
    load_centroids,
    load_pilot,
    save_tables,
    smaller,
    top_probabilities,
)
from shared.system.atomic import link
from shared.system.errors import TideError
from teacher_cache.maintenance.reshape import begin, finished
from teacher_cache.run.tables.classes import cluster


@dataclasses.dataclass(frozen=True)
class _Tables:
    vocabulary: Vocabulary
    pilot: Pilot
    centroids: Float[np.ndarray, "classes width"]
    merged: Int[np.ndarray, " classes"]


def prune_cache(
    source: Path,
    target: Path,
    k: int | None = None,
    draws: int | None = None,
    classes: int | None = None,
) -> Manifest:
    """A cache with at most `k` logits a position, `classes` classes and the first `draws` draws. Interrupted and called
    again, it goes on. TideError where `source` has less.
    """
    manifest = finished(source)
    targets = manifest.fingerprint.targets
    for name, asked, has in (("k", k, targets.k), ("classes", classes, targets.classes),
                             ("draws", draws, manifest.draws)):  # fmt: skip
        if asked is not None and not 1 <= asked <= has:
            raise TideError(f"{name} is {asked}, and {source} holds {has}", expected=f"1 to {has}")
    layout = manifest.layout(source)
    fewer = (k or targets.k, classes or targets.classes)
    made, tables = dataclasses.replace(manifest, draws=draws or manifest.draws), None
    if fewer != (targets.k, targets.classes):
        tables = _smaller_tables(source, layout, *fewer)
        fingerprint = dataclasses.replace(
            manifest.fingerprint,
            targets=dataclasses.replace(targets, k=fewer[0], classes=fewer[1]),
            tables=tables.vocabulary.digest,
            pruned_from={"k": targets.k, "classes": targets.classes},
        )
        made = dataclasses.replace(made, fingerprint=fingerprint)
    begin(target, made, source, tables is None)
    if tables is not None:
        save_tables(target / TABLES, tables.vocabulary, tables.pilot, tables.centroids)
    _write(source, target, made, layout, tables)
    settle_ledger(target, made)
    return made


def _write(
    source: Path, target: Path, made: Manifest, layout: Layout, tables: _Tables | None
) -> None:
    done = set(finished_units(target))
    for unit in tqdm([u for u in made.units() if u not in done], unit="shard", desc="prune"):
        path = unit.path(source)
        if tables is None:
            content = path.read_bytes()
            link(path, unit.path(target))
            note(target, unit, Entry.of(content, read_table(path, layout, content).counts))
            continue
        new = dataclasses.replace(layout, vocabulary=tables.vocabulary)
        shard = read_table(path, layout)
        rows = [
            cut(row, layout, made.fingerprint.targets.k, tables.merged)
            for row in shard.rows(path, layout)
        ]
        counts = {**shard.counts, CACHE: made.digest}
        note(target, unit, Entry.of(write_shard(unit.path(target), rows, new, counts), counts))


def _smaller_tables(source: Path, layout: Layout, k: int, classes: int) -> _Tables:
    assert layout.vocabulary is not None
    centroids, had = load_centroids(source), layout.classes
    merged = np.arange(had, dtype=np.int32)
    if classes < had:
        merged, centroids = cluster(torch.from_numpy(centroids.copy()), np.ones(had, bool), classes)
    vocabulary, pilot = smaller(
        layout.vocabulary, load_pilot(source), layout.temperatures, k, merged
    )
    return _Tables(vocabulary, pilot, centroids, merged)


def cut(row: CacheRow, layout: Layout, k: int, merged: Int[np.ndarray, " classes"]) -> CacheRow:
    """The first `k` entries of every list; class c is now part of `merged[c]`."""
    if (
        row.topk_sizes is None
        or row.topk_ids is None
        or row.topk_logp is None
        or row.tail_odds is None
    ):
        return row
    sizes, n = row.topk_sizes, row.topk_sizes.size
    starts, owner = np.cumsum(sizes) - sizes, np.repeat(np.arange(n), sizes)
    dropped = np.arange(int(sizes.sum())) - np.repeat(starts, sizes) >= k
    assert layout.vocabulary is not None
    own, count = layout.vocabulary.class_of[row.topk_ids], int(merged.max()) + 1
    odds, masses = np.zeros_like(row.tail_odds), np.zeros((n, len(layout.temperatures), count))
    for i, temperature in enumerate(layout.temperatures):
        before = np.exp(_class_masses(row, layout, i))
        for c in range(before.shape[1]):
            masses[:, i, merged[c]] += before[:, c]
        p = top_probabilities(row.topk_logp, owner, row.tail_odds[:, i], temperature)
        np.add.at(masses[:, i], (owner[dropped], merged[own[dropped]]), p[dropped])
        inside = np.bincount(owner[~dropped], p[~dropped], n)
        with np.errstate(divide="ignore"):
            odds[:, i] = np.log(masses[:, i].sum(axis=1)) - np.log(np.maximum(inside, 1e-300))
    with np.errstate(divide="ignore"):
        log_masses = np.maximum(np.log(masses), EMPTY).astype(np.float32)
    return dataclasses.replace(
        row,
        topk_sizes=np.minimum(sizes, k).astype(np.int32),
        topk_ids=row.topk_ids[~dropped],
        topk_logp=row.topk_logp[~dropped],
        tail_odds=np.clip(odds, -LARGEST_ODDS, LARGEST_ODDS).astype(np.float32),
        class_mass=log_masses if count > 1 else None,
    )


def _class_masses(row: CacheRow, layout: Layout, i: int) -> Float[np.ndarray, "n classes"]:
    """Log-masses of the row's classes at the i-th temperature."""
    assert row.tail_odds is not None and layout.vocabulary is not None
    odds = torch.from_numpy(row.tail_odds[:, i].copy())
    if row.class_mass is None:
        return torch.nn.functional.logsigmoid(odds)[:, None].numpy()
    if row.class_mass.dtype != np.uint8:
        return row.class_mass[:, i]
    shares = torch.from_numpy(layout.vocabulary.class_prior[i])
    return class_log_mass(torch.from_numpy(row.class_mass[:, i].copy()), odds, shares).numpy()
