"""`tide merge` and `tide prune`: a cache out of finished ones. Interrupted, both go on.

A merged cache has the shards of several, or of parts of one. A pruned one has fewer draws, logits a
position or coefficients of the tail: what leaves a top-k joins the tail, the last coefficients are
dropped. Shards that stay what they are keep their very bytes: their file is linked (or copied).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from shared.cache import shards, value_checks
from shared.cache.ledger import Entry, entry_of, load_ledger, note, settle_ledger, whole_ledger
from shared.cache.levels import EMPTY, LARGEST_LEVEL
from shared.cache.manifest import Manifest, check_fingerprint, load_manifest, refuse_unfinished
from shared.cache.row import CacheRow
from shared.cache.shards import CACHE, TABLES, Unit, finished_units
from shared.cache.stores import small_files
from shared.cache.tail import LinearTail
from shared.system.files import TideError, link, read_bytes, refuse_unwritable, write_bytes

# What a killed run may have left before it came to the manifest.
_BEFORE_MANIFEST = ("student_tokenizer", "teacher_tokenizer", TABLES)


def _begin(target: Path, manifest: Manifest, source: Path, tables: bool = True) -> None:
    """Tokenizers, tables (where they stay) and manifest of a new cache. TideError over another."""
    refuse_unwritable(target)
    if target.exists() and any(path.name not in _BEFORE_MANIFEST for path in target.iterdir()):
        old = load_manifest(target)
        wanted = replace(manifest, sources=old.sources)  # a name is no difference
        check_fingerprint(target, old, wanted, "go on with it")
        return
    for file in small_files(source):
        if tables or file.parent.name != TABLES:
            write_bytes(target / file.relative_to(source), read_bytes(file, source))
    manifest.save(target)


def merge_caches(sources: Sequence[Path], target: Path) -> Manifest:
    """One cache out of several: parts of one (the same settings, some shards in each), or such as
    differ in their data alone, whose examples follow each other. TideError for all others.
    """
    if len(sources) < 2:
        raise TideError(f"{len(sources)} cache to merge", expected="two or more")
    manifests = [load_manifest(source) for source in sources]
    first = manifests[0]
    # 1. the new manifest, and for each new shard the cache that it comes from and its unit there
    origins: dict[Unit, tuple[Path, Unit]] = {}
    if all(m.fingerprint == first.fingerprint for m in manifests):
        made = replace(first, draws=max(m.draws for m in manifests))
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
    missing = sorted(set(origins) - set(finished_units(target)))
    for unit in tqdm(missing, unit="shard", desc="merge"):
        source, old = origins[unit]
        manifest, layout, ledger = known[source]
        path = old.path(source)
        content = read_bytes(path, source)
        if old in ledger:
            ledger[old].check(path, content)
        if manifest.digest == made.digest and unit == old:
            link(path, unit.path(target), source)
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
        same_data = replace(manifest.fingerprint, data=first.fingerprint.data)
        theirs = replace(first, draws=manifest.draws, fingerprint=same_data)
        fix = "build them with the same settings, all but the first with targets.tables_from=FIRST;"
        fix += " `tide prune` makes k, rank and draws smaller"
        check_fingerprint(sources[0], first, theirs, f"merge it with {source}", fix)
    data = [manifest.fingerprint.data for manifest in manifests]
    contents = [one.content for one in data]
    if len(set(contents)) < len(data):
        raise TideError("two of these caches hold the same data", fix="leave one out")
    content = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
    parts_of, count = tuple(one.to_json() for one in data), sum(one.examples for one in data)
    merged = replace(data[0], content=content, examples=count, merged_from=parts_of)
    names = tuple(dict.fromkeys(name for manifest in manifests for name in manifest.sources))
    fingerprint = replace(first.fingerprint, data=merged)
    parts = sum(manifest.parts for manifest in manifests)
    return Manifest(fingerprint, first.draws, parts, merged.examples, sources=names)


def prune_cache(source: Path, target: Path, **wanted: int | None) -> Manifest:
    """A cache with at most `k` logits a position, `rank` coefficients and the first `draws` draws.
    TideError where `source` is not finished, or has less.
    """
    manifest = load_manifest(source)
    ledger = whole_ledger(source, manifest)
    refuse_unfinished(source, manifest)
    targets, layout = manifest.fingerprint.targets, manifest.layout(source)
    known = {"k": targets.k, "rank": layout.rank, "draws": manifest.draws}
    for name, has in known.items():
        asked = wanted.get(name)
        if asked is not None and not 1 <= asked <= has:
            raise TideError(f"{name} is {asked}, and {source} holds {has}", expected=f"1 to {has}")
    k, rank, draws = (wanted.get(name) or has for name, has in known.items())
    made = replace(manifest, draws=draws)
    if (k, rank) == (targets.k, layout.rank) or layout.tables is None:
        # Fewer draws alone change no byte of a shard.
        _begin(target, made, source)
        for unit in sorted(set(made.units()) - set(finished_units(target))):
            link(unit.path(source), unit.path(target), source)
            note(target, unit, ledger[unit])
        settle_ledger(target, made)
        return made
    # 1. the tables' first columns
    new = replace(layout, tables=layout.tables.cut(rank))
    assert new.tables is not None
    changes: Any = {"targets": replace(targets, k=k, rank=rank), "tables": new.tables.digest}
    changes["pruned_from"] = {"k": targets.k, "rank": layout.rank}
    fingerprint = replace(manifest.fingerprint, **changes)
    made = replace(made, fingerprint=fingerprint)
    _begin(target, made, source, tables=False)
    shards.save_tables(target / TABLES, new.tables)
    # 2. row by row
    old, fewer = (LinearTail.of(x.tables, x.temperatures) for x in (layout, new) if x.tables)
    units = sorted(set(made.units()) - set(finished_units(target)))
    for unit in tqdm(units, unit="shard", desc="prune"):
        path = unit.path(source)
        shard = value_checks.sound(path, layout, manifest, read_bytes(path, source))
        rows = [cut(row, old, fewer, layout.tables.unit, k) for row in shard.rows(path, layout)]
        counts = {**shard.counts, CACHE: made.digest}
        written = shards.write_shard(unit.path(target), rows, new, counts)
        note(target, unit, Entry.of(written, counts))
    settle_ledger(target, made)
    return made


def cut(row: CacheRow, old: LinearTail, new: LinearTail, unit: float, k: int) -> CacheRow:
    """The first `k` entries of every list, and the coefficients of `new`, the tables cut. What
    leaves a list joins the tail with its own weight.
    """
    assert row.topk_sizes is not None and row.topk_ids is not None and row.topk_logp is not None
    assert row.tail_code is not None and row.tail_level is not None
    n, rank = row.topk_sizes.size, new.directions.shape[1]
    # 1. Entries of the lists as a rectangle, and those that stay.                           (n, k)
    place = np.arange(row.topk_sizes.max(initial=1))
    there = place < row.topk_sizes[:, None]
    ids, logp = np.zeros(there.shape, np.int64), np.full(there.shape, EMPTY, np.float32)
    ids[there], logp[there] = row.topk_ids, row.topk_logp
    ids = np.where(there, ids, ids[:, :1])
    stays = there & (place < k)
    # 2. The tail's weight at each temperature, with those that leave.           (n, temperatures)
    code = torch.from_numpy(row.tail_code.astype(np.float32) * np.float32(unit))
    listed, gone = torch.from_numpy(ids), torch.from_numpy(np.where(there & ~stays, logp, EMPTY))
    before = old.levels(code, listed, torch.zeros(n, len(old.base)))  # −log Σ exp x_T
    tails = torch.from_numpy(row.tail_level.copy()) - before
    leaving = [torch.logsumexp(gone / temperature, dim=1) for temperature in old.base]
    tails = torch.logaddexp(tails, torch.stack(leaving, dim=1))
    # 3. The new level, which gives the shorter code that weight.
    kept = torch.from_numpy(np.where(stays, ids, ids[:, :1]))
    level = new.levels(code[:, :rank], kept, tails).clamp(-LARGEST_LEVEL, LARGEST_LEVEL)
    return replace(
        row, topk_sizes=np.minimum(row.topk_sizes, k).astype(np.int32),
        topk_ids=row.topk_ids[stays[there]], topk_logp=row.topk_logp[stays[there]],
        tail_code=row.tail_code[:, :rank], tail_level=level.numpy(),
    )  # fmt: skip
