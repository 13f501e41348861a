"""Another cache out of finished ones: a smaller one (`tide prune`), or one of several (`tide merge`).

Tables are cut and copied as they are: no number is decoded and rounded again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from shared.atomic import write_bytes
from shared.errors import TideError
from shared.manifest import Manifest, differences, load_manifest, refuse_unfinished
from shared.shards import CACHE, Unit, finished_units, read_table, shard_counts, write_table


def prune_cache(source: Path, target: Path, k: int | None = None, draws: int | None = None) -> Manifest:
    """A cache with at most `k` logits a position and the first `draws` draws: byte for byte the one that `tide cache`
    writes with these settings. Interrupted and called again, it goes on. TideError where `source` has less.
    """
    manifest = _finished(source)
    has = manifest.fingerprint["targets"]["k"]
    if k is not None and not 1 <= k <= has:
        raise TideError(f"k is {k}, and {source} holds {has} logits a position", expected=f"1 to {has}")
    if draws is not None and not 1 <= draws <= manifest.draws:
        raise TideError(f"draws is {draws}, and {source} holds {manifest.draws}", expected=f"1 to {manifest.draws}")
    fingerprint = json.loads(json.dumps(manifest.fingerprint))
    fingerprint["targets"]["k"] = has if k is None else k
    made = dataclasses.replace(manifest, fingerprint=fingerprint, draws=draws or manifest.draws)
    _begin(target, made, source)
    cut = (lambda table: _cut(table, k)) if k is not None and k < has else (lambda table: table)
    _copy([(source, unit, unit) for unit in made.units()], target, made, cut, "prune")
    return made


def _cut(table: pa.Table, k: int) -> pa.Table:
    """The first `k` entries of every position's list."""
    place = {name: table.schema.get_field_index(name) for name in ("topk_sizes", "topk_ids", "topk_logp")}
    sizes_column, ids, logp = (table.column(name).combine_chunks() for name in place)
    sizes = sizes_column.values.to_numpy()
    starts = np.cumsum(sizes) - sizes
    rank = np.arange(int(sizes.sum())) - np.repeat(starts, sizes)
    kept, fewer = rank < k, np.minimum(sizes, k).astype(np.int32)
    ends = np.concatenate([[0], np.cumsum(fewer)])
    offsets = pa.array(ends[sizes_column.offsets.to_numpy()].astype(np.int32))
    new = {
        "topk_sizes": pa.ListArray.from_arrays(sizes_column.offsets, pa.array(fewer)),
        "topk_ids": pa.ListArray.from_arrays(offsets, ids.values.filter(pa.array(kept))),
        "topk_logp": pa.ListArray.from_arrays(offsets, logp.values.filter(pa.array(kept))),
    }
    for name, column in new.items():
        field = table.schema.field(name)
        table = table.set_column(place[name], field, column.cast(field.type))
    return table


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
    _begin(target, made, sources[0])
    _copy(jobs, target, made, lambda table: table, "merge")
    return made


def _one_after_the_other(
    sources: Sequence[Path], manifests: Sequence[Manifest]
) -> tuple[Manifest, list[tuple[Path, Unit, Unit]]]:
    first = manifests[0]
    for source, manifest in zip(sources, manifests, strict=True):
        _finished(source)
        theirs = {**manifest.fingerprint, "data": first.fingerprint["data"]}
        lines = differences({"draws": first.draws, **first.fingerprint}, {"draws": manifest.draws, **theirs})
        if lines:
            raise TideError(
                f"{sources[0]} and {source} were made with other settings:\n    " + "\n    ".join(lines),
                expected="caches that differ in nothing but their data",
                fix="build them with the same settings; `tide prune` makes k and draws smaller",
            )
    data = [manifest.fingerprint["data"] for manifest in manifests]
    if len({d["content"] for d in data}) < len(data):
        raise TideError("two of these caches hold the same data", fix="leave one out")
    content = hashlib.sha256(json.dumps([d["content"] for d in data]).encode()).hexdigest()
    merged = {**data[0], "content": content, "examples": sum(d["examples"] for d in data), "merged_from": data}
    parts = np.cumsum([0, *(manifest.parts for manifest in manifests)]).tolist()
    made = Manifest({**first.fingerprint, "data": merged}, first.draws, parts[-1], merged["examples"])
    jobs = [
        (source, unit, Unit(unit.draw, unit.part + offset))
        for source, manifest, offset in zip(sources, manifests, parts, strict=False)
        for unit in manifest.units()
    ]
    return made, jobs


def _finished(cache: Path) -> Manifest:
    manifest = load_manifest(cache)
    refuse_unfinished(cache, manifest)
    return manifest


def _begin(target: Path, manifest: Manifest, source: Path) -> None:
    """The target's tokenizers and manifest, or TideError where another cache lies there."""
    if target.exists() and any(target.iterdir()):
        old = load_manifest(target)
        lines = differences(dataclasses.asdict(old), json.loads(json.dumps(dataclasses.asdict(manifest))))
        if lines:
            raise TideError(
                f"{target} holds another cache (there → wanted):\n    " + "\n    ".join(lines),
                fix="choose a new folder",
            )
        return
    for folder in sorted(source.glob("*_tokenizer")):
        for file in folder.iterdir():
            write_bytes(target / folder.name / file.name, file.read_bytes())
    manifest.save(target)


def _copy(
    jobs: Sequence[tuple[Path, Unit, Unit]],
    target: Path,
    manifest: Manifest,
    change: Callable[[pa.Table], pa.Table],
    word: str,
) -> None:
    done = set(finished_units(target))
    digests = {source: load_manifest(source).digest for source in {source for source, _, _ in jobs}}
    for source, unit, place in tqdm(jobs, unit="shard", desc=word):
        if place in done:
            continue
        path = unit.path(source)
        counts: dict[str, Any] = shard_counts(path, digests[source])
        counts.pop("rows")
        write_table(place.path(target), change(read_table(path)), {**counts, CACHE: manifest.digest})
