"""Another cache out of finished ones: a smaller one (`tide prune`), or one of several (`tide merge`).

Shards that stay what they are keep their very bytes where they may: their file is linked (or copied) as it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from shared.cache.ledger import Entry, load_ledger, note, settle_ledger, whole_ledger
from shared.cache.manifest import Manifest, differences, load_manifest, refuse_unfinished
from shared.cache.shards import (
    CACHE,
    Unit,
    finished_units,
    read_table,
    refuse_other_cache,
    write_table,
)
from shared.cache.vocabulary import TABLES
from shared.system.atomic import link, write_bytes
from shared.system.errors import TideError
from shared.system.files import refuse_unwritable

_BEFORE_MANIFEST = ("student_tokenizer", "teacher_tokenizer", TABLES)
"""What a killed run may have left before it came to the manifest."""


def begin(target: Path, manifest: Manifest, source: Path, tables: bool = True) -> None:
    """Tokenizers, the tables of `source` where they stay, and manifest. TideError where another cache lies there."""
    refuse_unwritable(target)
    if target.exists() and any(path.name not in _BEFORE_MANIFEST for path in target.iterdir()):
        old = load_manifest(target)
        same_names = dataclasses.replace(manifest, sources=old.sources)  # a name is no difference
        lines = differences(old.to_json(), same_names.to_json())
        if lines:
            raise TideError(
                f"{target} holds another cache (there → wanted):\n    " + "\n    ".join(lines),
                fix="choose a new folder",
            )
        return
    for folder in [*sorted(source.glob("*_tokenizer")), *([source / TABLES] if tables else [])]:
        for file in sorted(folder.glob("*")):
            write_bytes(target / folder.name / file.name, file.read_bytes())
    manifest.save(target)


def merge_caches(sources: Sequence[Path], target: Path) -> Manifest:
    """One cache out of several: parts of one (the same settings, some shards in each), or caches that differ in their
    data alone, whose examples then follow each other. TideError, with what differs, for all others.
    """
    if len(sources) < 2:
        raise TideError(f"{len(sources)} cache to merge", expected="two or more")
    manifests = [load_manifest(source) for source in sources]
    first = manifests[0]
    if all(m.fingerprint == first.fingerprint for m in manifests):
        made = dataclasses.replace(first, draws=max(m.draws for m in manifests))
        found = {unit: source for source in sources for unit in finished_units(source)}
        jobs = [(found[unit], unit, unit) for unit in sorted(found)]
    else:
        made, jobs = _one_after_the_other(sources, manifests)
    begin(target, made, sources[0])
    _copy(jobs, target, made)
    settle_ledger(target, made)
    return made


def _one_after_the_other(
    sources: Sequence[Path], manifests: Sequence[Manifest]
) -> tuple[Manifest, list[tuple[Path, Unit, Unit]]]:
    first = manifests[0]
    for source, manifest in zip(sources, manifests, strict=True):
        refuse_unfinished(source, manifest)
        theirs = dataclasses.replace(manifest.fingerprint, data=first.fingerprint.data)
        lines = differences(
            {"draws": first.draws, **first.fingerprint.to_json()},
            {"draws": manifest.draws, **theirs.to_json()},
        )
        if lines:
            raise TideError(
                f"{sources[0]} and {source} were made with other settings:\n    "
                + "\n    ".join(lines),
                expected="caches that differ in nothing but their data",
                fix="build them with the same settings, all but the first with targets.tables_from=FIRST; "
                "`tide prune` makes k, classes and draws smaller",
            )
    data = [manifest.fingerprint.data for manifest in manifests]
    if len({d.content for d in data}) < len(data):
        raise TideError("two of these caches hold the same data", fix="leave one out")
    content = hashlib.sha256(json.dumps([d.content for d in data]).encode()).hexdigest()
    merged = dataclasses.replace(
        data[0],
        content=content,
        examples=sum(d.examples for d in data),
        merged_from=tuple(d.to_json() for d in data),
    )
    parts = np.cumsum([0, *(manifest.parts for manifest in manifests)]).tolist()
    names = tuple(dict.fromkeys(name for manifest in manifests for name in manifest.sources))
    made = Manifest(
        dataclasses.replace(first.fingerprint, data=merged),
        first.draws,
        parts[-1],
        merged.examples,
        sources=names,
    )
    jobs = [
        (source, unit, Unit(unit.draw, unit.part + offset))
        for source, manifest, offset in zip(sources, manifests, parts, strict=False)
        for unit in manifest.units()
    ]
    return made, jobs


def _copy(jobs: Sequence[tuple[Path, Unit, Unit]], target: Path, manifest: Manifest) -> None:
    """Shards under the target's manifest. Where nothing in a file changes it is linked, else its columns are copied."""
    done, known = set(finished_units(target)), {}
    for source in {source for source, _, _ in jobs}:
        own = load_manifest(source)
        known[source] = (own, own.layout(source), load_ledger(source, own))
    for source, unit, place in tqdm(jobs, unit="shard", desc="merge"):
        if place in done:
            continue
        own, layout, ledger = known[source]
        path = unit.path(source)
        content = path.read_bytes()
        if unit in ledger:
            ledger[unit].check(path, content)
        if own.digest == manifest.digest and unit == place:
            link(path, place.path(target))
            entry = ledger.get(unit) or Entry.of(content, read_table(path, layout, content).counts)
        else:
            shard = read_table(path, layout, content)
            refuse_other_cache(path, shard.counts, own.digest)
            counts: dict[str, Any] = {
                **shard.counts,
                "draw": place.draw,
                "part": place.part,
                CACHE: manifest.digest,
            }
            entry = Entry.of(write_table(place.path(target), shard.table, layout, counts), counts)
        note(target, place, entry)


def finished(cache: Path) -> Manifest:
    """The manifest of a cache that is whole. TideError where it is not."""
    manifest = load_manifest(cache)
    whole_ledger(cache, manifest)
    refuse_unfinished(cache, manifest)
    return manifest
