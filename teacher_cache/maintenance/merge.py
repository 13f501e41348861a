"""`tide merge`: one cache out of several finished ones, or out of parts of one.

Shards that stay what they are keep their very bytes: their file is linked (or copied) as it is.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from shared.cache.fingerprint import differences
from shared.cache.ledger import Entry, entry_of, load_ledger, note, settle_ledger
from shared.cache.manifest import Manifest, load_manifest, refuse_unfinished
from shared.cache.shards import (
    CACHE,
    Unit,
    finished_units,
    read_table,
    refuse_other_cache,
    write_table,
)
from shared.cache.vocabulary import TABLES
from shared.system.errors import TideError
from shared.system.files import link, refuse_unwritable, write_bytes

# What a killed run may have left before it came to the manifest.
_BEFORE_MANIFEST = ("student_tokenizer", "teacher_tokenizer", TABLES)
Job = tuple[
    Path, Unit, Unit
]  # the cache that a shard comes from, its unit there, and in the new one


def begin(target: Path, manifest: Manifest, source: Path, tables: bool = True) -> None:
    """Tokenizers, tables (where they stay those of `source`) and manifest of a new cache.

    TideError where another cache lies there.
    """
    refuse_unwritable(target)
    if target.exists() and any(path.name not in _BEFORE_MANIFEST for path in target.iterdir()):
        old = load_manifest(target)
        wanted = dataclasses.replace(manifest, sources=old.sources)  # a name is no difference
        lines = differences(old.to_json(), wanted.to_json())
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
    """One cache out of several. Interrupted and called again, it goes on.

    They are parts of one (the same settings, some shards in each), or differ in their data alone,
    and then their examples follow each other. TideError, with what differs, for all others.
    """
    if len(sources) < 2:
        raise TideError(f"{len(sources)} cache to merge", expected="two or more")
    manifests = [load_manifest(source) for source in sources]
    first = manifests[0]
    jobs: list[Job]
    if all(m.fingerprint == first.fingerprint for m in manifests):
        made = dataclasses.replace(first, draws=max(m.draws for m in manifests))
        homes = {unit: source for source in sources for unit in finished_units(source)}
        jobs = [(homes[unit], unit, unit) for unit in sorted(homes)]
    else:
        made, jobs = _one_after_the_other(sources, manifests)
    begin(target, made, sources[0])
    _copy(jobs, target, made)
    settle_ledger(target, made)
    return made


def _one_after_the_other(
    sources: Sequence[Path], manifests: Sequence[Manifest]
) -> tuple[Manifest, list[Job]]:
    """The manifest of caches that differ in their data alone, and which shard becomes which."""
    first = manifests[0]
    for source, manifest in zip(sources, manifests, strict=True):
        refuse_unfinished(source, manifest)
        theirs = dataclasses.replace(manifest.fingerprint, data=first.fingerprint.data)
        lines = differences(
            {"draws": first.draws, **first.fingerprint.to_json()},
            {"draws": manifest.draws, **theirs.to_json()},
        )
        if lines:
            told = "\n    ".join(lines)
            raise TideError(
                f"{sources[0]} and {source} were made with other settings:\n    {told}",
                expected="caches that differ in nothing but their data",
                fix="build them with the same settings, all but the first with "
                "targets.tables_from=FIRST; `tide prune` makes k, classes and draws smaller",
            )
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
    jobs: list[Job] = []
    parts = 0
    for source, manifest in zip(sources, manifests, strict=True):
        units = manifest.units()
        jobs += [(source, unit, Unit(unit.draw, unit.part + parts)) for unit in units]
        parts += manifest.parts
    names = tuple(dict.fromkeys(name for manifest in manifests for name in manifest.sources))
    fingerprint = dataclasses.replace(first.fingerprint, data=merged)
    return Manifest(fingerprint, first.draws, parts, merged.examples, sources=names), jobs


def _copy(jobs: Sequence[Job], target: Path, manifest: Manifest) -> None:
    """Shards under the target's manifest: linked where nothing changes, else copied by column."""
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
            entry = ledger.get(unit) or entry_of(path, content, own)
        else:
            shard = read_table(path, layout, content)
            refuse_other_cache(path, shard.counts, own.digest)
            new = {"draw": place.draw, "part": place.part, CACHE: manifest.digest}
            counts = {**shard.counts, **new}
            entry = Entry.of(write_table(place.path(target), shard.table, layout, counts), counts)
        note(target, place, entry)
