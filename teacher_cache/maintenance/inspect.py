"""`tide inspect`: what a cache holds, from its shards alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shared.manifest import Manifest, load_manifest
from shared.schema import CacheRow
from shared.shards import Unit, finished_units, read_shard
from teacher_cache.maintenance.sizes import column_bytes

T_EDGES = np.linspace(0.0, 1.0, 6)
LOGP_EDGES = np.array([-np.inf, -8.0, -4.0, -2.0, -1.0, -0.5, -0.1, 0.0])


@dataclass
class Inspection:
    """Sums over the rows that were read. Masses are probabilities, likelihoods nats."""

    manifest: Manifest
    units: list[Unit]
    rows: int = 0
    masked: int = 0
    chunks: int = 0
    masked_by_t: np.ndarray = field(default_factory=lambda: np.zeros(5, np.int64))
    mass: dict[float, float] = field(default_factory=dict)
    """Mean teacher mass inside the top-k at each stored temperature; empty without the signal."""
    kept: float = 0.0
    """Mean logits kept per position."""
    chunk_tokens: Counter[tuple[int, int]] = field(default_factory=Counter)
    """How many chunks have so many teacher and student tokens."""
    likelihoods: np.ndarray = field(default_factory=lambda: np.zeros((5, 7), np.int64))
    """Chunks by t (rows) and log-likelihood (columns, edges `LOGP_EDGES`)."""
    bytes_by_column: Counter[str] = field(default_factory=Counter)


def inspect_cache(folder: Path) -> Inspection:
    """Read every finished shard of the cache at `folder`, one at a time. TideError where it is no cache."""
    manifest = load_manifest(folder)
    found = Inspection(manifest, finished_units(folder))
    masses = dict.fromkeys(manifest.temperatures, 0.0)
    kept = positions = 0
    for unit in found.units:
        path = unit.path(folder)
        found.bytes_by_column.update(column_bytes(path))
        for row in read_shard(path, manifest.temperatures):
            _count(found, row)
            if row.topk_sizes is not None and row.topk_logits is not None:
                kept += int(row.topk_sizes.sum())
                positions += row.topk_sizes.size
                owner = np.repeat(np.arange(row.topk_sizes.size), row.topk_sizes)
                for i, t in enumerate(masses):
                    masses[t] += float(np.exp(row.topk_logits / t - row.logsumexp[owner, i]).sum())
    if positions:
        found.mass = {t: total / positions for t, total in masses.items()}
        found.kept = kept / positions
    return found


def _count(found: Inspection, row: CacheRow) -> None:
    bucket = min(4, int(row.t * 5))
    found.rows += 1
    found.masked += row.masked.size
    found.masked_by_t[bucket] += row.masked.size
    if row.chunk_logp is None or row.chunk_student is None or row.chunk_teacher is None:
        return
    found.chunks += row.chunk_logp.size
    sizes = np.stack([np.diff(row.chunk_teacher, axis=1)[:, 0], np.diff(row.chunk_student, axis=1)[:, 0]], axis=1)
    found.chunk_tokens.update(map(tuple, sizes.tolist()))
    # Intervals are open to the left, so that a log-likelihood of exactly 0 falls into the last one.
    places = np.clip(np.searchsorted(LOGP_EDGES, row.chunk_logp, side="left") - 1, 0, 6)
    found.likelihoods[bucket] += np.bincount(places, minlength=7)


def describe(found: Inspection) -> str:
    """The inspection in words and small tables."""
    manifest, fingerprint = found.manifest, found.manifest.fingerprint
    teacher, units = fingerprint["teacher"], len(manifest.units())
    lines = [
        f"teacher {teacher['name']} ({teacher['architecture']}, {teacher['attention']['type']}), engine "
        f"{fingerprint['engine']['type']} in {fingerprint['engine']['dtype']}",
        f"{len(found.units)} of {units} shards, {manifest.draws} draws of {manifest.examples:,} examples",
        f"{found.rows:,} rows, {found.masked:,} masked positions, {found.chunks:,} chunks",
    ]
    if found.mass:
        masses = ", ".join(f"{mass:.3f} at T = {t:g}" for t, mass in found.mass.items())
        lines.append(f"top-k: {found.kept:.1f} logits a position, teacher mass {masses}")
    if found.chunks:
        common = ", ".join(f"{t}:{s} {n / found.chunks:.1%}" for (t, s), n in found.chunk_tokens.most_common(6))
        lines.append(f"chunks, teacher tokens : student tokens: {common}")
    lines += ["", "by t              masked   share of chunks with log p(c) in nats"]
    labels = [f"≤{edge:g}" for edge in LOGP_EDGES[1:]]
    lines.append(" " * 26 + "".join(f"{label:>8}" for label in labels))
    for i in range(5):
        of_all = found.likelihoods[i] / max(1, found.likelihoods[i].sum())
        shares = "".join(f"{share:>8.1%}" for share in of_all) if found.chunks else ""
        lines.append(f"{T_EDGES[i]:.1f} to {T_EDGES[i + 1]:.1f} {found.masked_by_t[i]:>15,}{shares}")
    total = sum(found.bytes_by_column.values())
    lines += ["", f"bytes on disk by column: {total:,}, {total / max(1, found.masked):.0f} a masked position"]
    for name, size in found.bytes_by_column.most_common():
        lines.append(f"  {name:<16}{size:>14,}{size / max(1, total):>8.1%}{size / max(1, found.masked):>9.1f}")
    return "\n".join(lines)
