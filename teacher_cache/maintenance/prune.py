"""`tide prune`: fewer logits a position, fewer classes or fewer draws, from a finished cache.

What is outside of the new top-k joins the tail: its mass is added to that of its class, and to the
prior, which the pilot sample gives for every k. Fewer classes are classes of classes.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm import tqdm

from shared.cache.ledger import Entry, note, settle_ledger, whole_ledger
from shared.cache.levels import EMPTY, LARGEST_ODDS, class_log_mass
from shared.cache.manifest import Manifest, load_manifest, refuse_unfinished
from shared.cache.row import CacheRow, Layout
from shared.cache.shards import CACHE, finished_units, read_table, write_shard
from shared.cache.vocabulary import (
    TABLES,
    load_centroids,
    load_pilot,
    save_tables,
    smaller,
    top_probabilities,
)
from shared.system.errors import TideError
from shared.system.files import link
from teacher_cache.maintenance.merge import begin
from teacher_cache.run.tables import cluster


def prune_cache(
    source: Path,
    target: Path,
    k: int | None = None,
    draws: int | None = None,
    classes: int | None = None,
) -> Manifest:
    """A cache with at most `k` logits a position, `classes` classes and the first `draws` draws.

    Interrupted and called again, it goes on. TideError where `source` is not finished, or has less.
    """
    manifest = load_manifest(source)
    ledger = whole_ledger(source, manifest)
    refuse_unfinished(source, manifest)
    targets, layout = manifest.fingerprint.targets, manifest.layout(source)
    limits = {
        "k": (k, targets.k),
        "classes": (classes, targets.classes),
        "draws": (draws, manifest.draws),
    }
    for name, (asked, has) in limits.items():
        if asked is not None and not 1 <= asked <= has:
            raise TideError(f"{name} is {asked}, and {source} holds {has}", expected=f"1 to {has}")
    k, classes = k or targets.k, classes or targets.classes
    made = dataclasses.replace(manifest, draws=draws or manifest.draws)
    if (k, classes) == (targets.k, targets.classes):
        # Fewer draws alone change no byte of a shard.
        begin(target, made, source)
        for unit in sorted(set(made.units()) - set(finished_units(target))):
            link(unit.path(source), unit.path(target))
            note(target, unit, ledger[unit])
        settle_ledger(target, made)
        return made
    # 1. tables of the new k and classes
    if layout.vocabulary is None:
        raise TideError(f"{source} holds no top-k", fix="prune draws alone")
    centroids, had = load_centroids(source), layout.classes
    merged = np.arange(had, dtype=np.int32)  # class c is now part of merged[c]
    if classes < had:
        merged, centroids = cluster(torch.from_numpy(centroids.copy()), np.ones(had, bool), classes)
    pilot = load_pilot(source)
    vocabulary, pilot = smaller(layout.vocabulary, pilot, layout.temperatures, k, merged)
    fingerprint = dataclasses.replace(
        manifest.fingerprint,
        targets=dataclasses.replace(targets, k=k, classes=classes),
        tables=vocabulary.digest,
        pruned_from={"k": targets.k, "classes": targets.classes},
    )
    made = dataclasses.replace(made, fingerprint=fingerprint)
    begin(target, made, source, tables=False)
    save_tables(target / TABLES, vocabulary, pilot, centroids)
    # 2. row by row
    new = dataclasses.replace(layout, vocabulary=vocabulary)
    units = sorted(set(made.units()) - set(finished_units(target)))
    for unit in tqdm(units, unit="shard", desc="prune"):
        path = unit.path(source)
        shard = read_table(path, layout)
        rows = [cut(row, layout, k, merged) for row in shard.rows(path, layout)]
        counts = {**shard.counts, CACHE: made.digest}
        note(target, unit, Entry.of(write_shard(unit.path(target), rows, new, counts), counts))
    settle_ledger(target, made)
    return made


def cut(row: CacheRow, layout: Layout, k: int, merged: Int[np.ndarray, " classes"]) -> CacheRow:
    """The first `k` entries of every list; class c is now part of `merged[c]`."""
    sizes, ids, logp = row.topk_sizes, row.topk_ids, row.topk_logp
    if sizes is None or ids is None or logp is None or row.tail_odds is None:
        return row
    assert layout.vocabulary is not None
    n, count = sizes.size, int(merged.max()) + 1
    # 1. entries that leave their lists: (kept,)
    owner = np.repeat(np.arange(n), sizes)
    dropped = np.arange(ids.size) - np.repeat(np.cumsum(sizes) - sizes, sizes) >= k
    own_class = layout.vocabulary.class_of[ids]
    # 2. the tail at each temperature: masses of the new classes, and of all against the list's
    odds = np.zeros_like(row.tail_odds)
    masses = np.zeros((n, len(layout.temperatures), count))
    for i, temperature in enumerate(layout.temperatures):
        before = np.exp(_class_log_masses(row, layout, i))
        for c in range(before.shape[1]):
            masses[:, i, merged[c]] += before[:, c]
        p = top_probabilities(logp, owner, row.tail_odds[:, i], temperature)
        np.add.at(masses[:, i], (owner[dropped], merged[own_class[dropped]]), p[dropped])
        inside = np.bincount(owner[~dropped], p[~dropped], n)
        with np.errstate(divide="ignore"):
            odds[:, i] = np.log(masses[:, i].sum(axis=1)) - np.log(np.maximum(inside, 1e-300))
    with np.errstate(divide="ignore"):
        log_masses = np.maximum(np.log(masses), EMPTY).astype(np.float32)
    return dataclasses.replace(
        row,
        topk_sizes=np.minimum(sizes, k).astype(np.int32),
        topk_ids=ids[~dropped],
        topk_logp=logp[~dropped],
        tail_odds=np.clip(odds, -LARGEST_ODDS, LARGEST_ODDS).astype(np.float32),
        class_mass=log_masses if count > 1 else None,
    )


def _class_log_masses(row: CacheRow, layout: Layout, i: int) -> Float[np.ndarray, "n classes"]:
    """Log-masses of the row's classes at the i-th temperature."""
    assert row.tail_odds is not None and layout.vocabulary is not None
    odds = torch.from_numpy(row.tail_odds[:, i].copy())
    if row.class_mass is None:
        return torch.nn.functional.logsigmoid(odds)[:, None].numpy()
    if row.class_mass.dtype != np.uint8:
        return row.class_mass[:, i]
    shares = torch.from_numpy(layout.vocabulary.class_prior[i])
    return class_log_mass(torch.from_numpy(row.class_mass[:, i].copy()), odds, shares).numpy()
