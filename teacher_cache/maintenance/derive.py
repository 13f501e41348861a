"""`tide merge` and `tide prune`: a cache out of finished ones. Interrupted, both go on.

A merged cache has the shards of several, or of parts of one. A pruned one has fewer draws, logits a
position or classes: what is outside of the new top-k joins the tail, its mass added to that of its
class, and to the prior, which the pilot sample gives for every k. Fewer classes are classes of
classes. Shards that stay what they are keep their very bytes: their file is linked (or copied).
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from tqdm import tqdm

from shared.cache import shards
from shared.cache.ledger import Entry, entry_of, load_ledger, note, settle_ledger, whole_ledger
from shared.cache.levels import EMPTY, LARGEST_ODDS, class_log_mass
from shared.cache.manifest import Manifest, check_fingerprint, load_manifest, refuse_unfinished
from shared.cache.row import CacheRow, Layout, Pilot, Vocabulary, ranks
from shared.cache.shards import CACHE, TABLES, Unit, finished_units
from shared.system.files import TideError, link, refuse_unwritable, write_bytes
from teacher_cache.run.tables import cluster

# What a killed run may have left before it came to the manifest.
_BEFORE_MANIFEST = ("student_tokenizer", "teacher_tokenizer", TABLES)


def _begin(target: Path, manifest: Manifest, source: Path, tables: bool = True) -> None:
    """Tokenizers, tables (where they stay) and manifest of a new cache. TideError over another."""
    refuse_unwritable(target)
    if target.exists() and any(path.name not in _BEFORE_MANIFEST for path in target.iterdir()):
        old = load_manifest(target)
        wanted = dataclasses.replace(manifest, sources=old.sources)  # a name is no difference
        check_fingerprint(target, old, wanted, "go on with it")
        return
    for folder in [*sorted(source.glob("*_tokenizer")), *([source / TABLES] if tables else [])]:
        for file in sorted(folder.glob("*")):
            write_bytes(target / folder.name / file.name, file.read_bytes())
    manifest.save(target)


def merge_caches(sources: Sequence[Path], target: Path) -> Manifest:
    """One cache out of several.

    They are parts of one (the same settings, some shards in each), or differ in their data alone,
    and then their examples follow each other. TideError, with what differs, for all others.
    """
    if len(sources) < 2:
        raise TideError(f"{len(sources)} cache to merge", expected="two or more")
    manifests = [load_manifest(source) for source in sources]
    first = manifests[0]
    # 1. the new manifest, and for each new shard the cache that it comes from and its unit there
    origins: dict[Unit, tuple[Path, Unit]] = {}
    if all(m.fingerprint == first.fingerprint for m in manifests):
        made = dataclasses.replace(first, draws=max(m.draws for m in manifests))
        for source in sources:
            origins |= {unit: (source, unit) for unit in finished_units(source)}
    else:
        made = _one_after_the_other(sources, manifests)
        parts = 0
        for source, manifest in zip(sources, manifests, strict=True):
            for unit in manifest.units():
                origins[Unit(unit.draw, unit.part + parts)] = (source, unit)
            parts += manifest.parts
    _begin(target, made, sources[0])
    # 2. its shards: linked where nothing changes, else copied by column
    known = {}
    for source, manifest in zip(sources, manifests, strict=True):
        known[source] = (manifest, manifest.layout(source), load_ledger(source, manifest))
    for unit in tqdm(
        sorted(set(origins) - set(finished_units(target))), unit="shard", desc="merge"
    ):
        source, old = origins[unit]
        manifest, layout, ledger = known[source]
        path = old.path(source)
        content = path.read_bytes()
        if old in ledger:
            ledger[old].check(path, content)
        if manifest.digest == made.digest and unit == old:
            link(path, unit.path(target))
            entry = ledger.get(old) or entry_of(path, content, manifest)
        else:
            shard = shards.read_table(path, layout, content, manifest.digest)
            counts = {**shard.counts, "draw": unit.draw, "part": unit.part, CACHE: made.digest}
            written = shards.write_table(unit.path(target), shard.table, layout, counts)
            entry = Entry.of(written, counts)
        note(target, unit, entry)
    settle_ledger(target, made)
    return made


def _one_after_the_other(sources: Sequence[Path], manifests: Sequence[Manifest]) -> Manifest:
    """The manifest of finished caches that differ in their data alone, TideError for others."""
    first = manifests[0]
    for source, manifest in zip(sources, manifests, strict=True):
        refuse_unfinished(source, manifest)
        same_data = dataclasses.replace(manifest.fingerprint, data=first.fingerprint.data)
        theirs = dataclasses.replace(first, draws=manifest.draws, fingerprint=same_data)
        fix = "build them with the same settings, all but the first with targets.tables_from=FIRST;"
        fix += " `tide prune` makes k, classes and draws smaller"
        check_fingerprint(sources[0], first, theirs, f"merge it with {source}", fix)
    data = [manifest.fingerprint.data for manifest in manifests]
    contents = [one.content for one in data]
    if len(set(contents)) < len(data):
        raise TideError("two of these caches hold the same data", fix="leave one out")
    merged = dataclasses.replace(
        data[0],
        content=hashlib.sha256(json.dumps(contents).encode()).hexdigest(),
        examples=sum(one.examples for one in data),
        merged_from=tuple(one.to_json() for one in data),
    )
    names = tuple(dict.fromkeys(name for manifest in manifests for name in manifest.sources))
    fingerprint = dataclasses.replace(first.fingerprint, data=merged)
    parts = sum(manifest.parts for manifest in manifests)
    return Manifest(fingerprint, first.draws, parts, merged.examples, sources=names)


def prune_cache(
    source: Path,
    target: Path,
    k: int | None = None,
    draws: int | None = None,
    classes: int | None = None,
) -> Manifest:
    """A cache with at most `k` logits a position, `classes` classes and the first `draws` draws.

    TideError where `source` is not finished, or has less.
    """
    manifest = load_manifest(source)
    ledger = whole_ledger(source, manifest)
    refuse_unfinished(source, manifest)
    targets, layout = manifest.fingerprint.targets, manifest.layout(source)
    asked = {"k": (k, targets.k), "classes": (classes, targets.classes)}
    asked["draws"] = (draws, manifest.draws)
    for name, (wanted, has) in asked.items():
        if wanted is not None and not 1 <= wanted <= has:
            raise TideError(f"{name} is {wanted}, and {source} holds {has}", expected=f"1 to {has}")
    k, classes = k or targets.k, classes or targets.classes
    made = dataclasses.replace(manifest, draws=draws or manifest.draws)
    if (k, classes) == (targets.k, targets.classes):
        # Fewer draws alone change no byte of a shard.
        _begin(target, made, source)
        for unit in sorted(set(made.units()) - set(finished_units(target))):
            link(unit.path(source), unit.path(target))
            note(target, unit, ledger[unit])
        settle_ledger(target, made)
        return made
    # 1. tables of the new k and classes
    if layout.vocabulary is None:
        raise TideError(f"{source} holds no top-k", fix="prune draws alone")
    centroids, had = shards.load_centroids(source), layout.classes
    merged = np.arange(had, dtype=np.int32)  # class c is now part of merged[c]
    if classes < had:
        merged, centroids = cluster(torch.from_numpy(centroids.copy()), np.ones(had, bool), classes)
    pilot = shards.load_pilot(source)
    vocabulary, pilot = smaller(layout.vocabulary, pilot, layout.temperatures, k, merged)
    fingerprint = dataclasses.replace(
        manifest.fingerprint,
        targets=dataclasses.replace(targets, k=k, classes=classes),
        tables=vocabulary.digest,
        pruned_from={"k": targets.k, "classes": targets.classes},
    )
    made = dataclasses.replace(made, fingerprint=fingerprint)
    _begin(target, made, source, tables=False)
    shards.save_tables(target / TABLES, vocabulary, pilot, centroids)
    # 2. row by row
    new = dataclasses.replace(layout, vocabulary=vocabulary)
    units = sorted(set(made.units()) - set(finished_units(target)))
    for unit in tqdm(units, unit="shard", desc="prune"):
        path = unit.path(source)
        shard = shards.read_table(path, layout)
        rows = [cut(row, layout, k, merged) for row in shard.rows(path, layout)]
        counts = {**shard.counts, CACHE: made.digest}
        written = shards.write_shard(unit.path(target), rows, new, counts)
        note(target, unit, Entry.of(written, counts))
    settle_ledger(target, made)
    return made


def smaller(
    vocabulary: Vocabulary,
    pilot: Pilot,
    temperatures: tuple[float, ...],
    k: int,
    merged: Int[np.ndarray, " classes"],
) -> tuple[Vocabulary, Pilot]:
    """The table for the first `k` entries of every list, its class c now part of `merged[c]`."""
    n = pilot.sizes.size
    # 1. the pilot's entries that leave their lists for the tail
    owner, dropped = _dropped(pilot.sizes, k)
    # 2. their probability joins the prior and the tail's odds, at each temperature
    prior, odds = vocabulary.prior.astype(np.float64), pilot.odds.astype(np.float64)
    for i, temperature in enumerate(temperatures):
        p = _top_probabilities(pilot.logp, owner, pilot.odds[:, i], temperature)
        prior[i] += np.bincount(pilot.ids[dropped], p[dropped], prior.shape[1]) / max(1, n)
        inside = np.maximum(np.bincount(owner[~dropped], p[~dropped], n), 1e-300)
        outside = 1 / (1 + np.exp(-odds[:, i])) + np.bincount(owner[dropped], p[dropped], n)
        odds[:, i] = np.log(outside) - np.log(inside)
    # 3. classes of classes; ranks by the shorter lists
    class_of = np.where(vocabulary.shared, merged[np.maximum(vocabulary.class_of, 0)], -1)
    sizes = np.minimum(pilot.sizes, k).astype(np.int32)
    shorter = Pilot(sizes, pilot.ids[~dropped], pilot.logp[~dropped], odds.astype(np.float32))
    prior = prior.astype(np.float32)
    return Vocabulary(class_of.astype(np.int32), ranks(shorter.ids, prior[0]), prior), shorter


def cut(row: CacheRow, layout: Layout, k: int, merged: Int[np.ndarray, " classes"]) -> CacheRow:
    """The first `k` entries of every list; class c is now part of `merged[c]`."""
    sizes, ids, logp = row.topk_sizes, row.topk_ids, row.topk_logp
    if sizes is None or ids is None or logp is None or row.tail_odds is None:
        return row
    assert layout.vocabulary is not None
    n, count = sizes.size, int(merged.max()) + 1
    # 1. entries that leave their lists: (kept,)
    owner, dropped = _dropped(sizes, k)
    own_class = layout.vocabulary.class_of[ids]
    # 2. the tail at each temperature: masses of the new classes, and of all against the list's
    odds = np.zeros_like(row.tail_odds)
    masses = np.zeros((n, len(layout.temperatures), count))
    for i, temperature in enumerate(layout.temperatures):
        before = np.exp(_class_log_masses(row, layout, i))
        for c in range(before.shape[1]):
            masses[:, i, merged[c]] += before[:, c]
        p = _top_probabilities(logp, owner, row.tail_odds[:, i], temperature)
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


def _dropped(sizes: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each entry of flat lists: its list's number, and whether it stands behind the first k."""
    owner = np.repeat(np.arange(sizes.size), sizes)
    rank = np.arange(owner.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return owner, rank >= k


def _top_probabilities(
    logp: np.ndarray, owner: np.ndarray, odds: np.ndarray, temperature: float
) -> np.ndarray:
    """Probabilities at `temperature` of list entries: log p at T = 1, and the tail's log-odds."""
    weight = np.exp(logp.astype(np.float64) / temperature)
    whole = np.bincount(owner, weight, odds.size)
    top = 1 / (1 + np.exp(odds.astype(np.float64)))  # mass of the whole list
    return weight * (top / np.maximum(whole, 1e-300))[owner]


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
