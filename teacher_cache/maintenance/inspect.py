"""`tide inspect`: what a cache holds, from its shards alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from shared.cache.checking import in_processes
from shared.cache.manifest import Manifest, load_manifest
from shared.cache.row import CacheRow, Layout
from shared.cache.shards import Unit, column_bytes, finished_units, read_shard

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
    positions: int = 0
    """Positions with a top-k."""
    chunk_tokens: Counter[tuple[int, int]] = field(default_factory=Counter)
    """How many chunks have so many teacher and student tokens."""
    likelihoods: np.ndarray = field(default_factory=lambda: np.zeros((5, 7), np.int64))
    """Chunks by t (rows) and log-likelihood (columns, edges `LOGP_EDGES`)."""
    bytes_by_column: Counter[str] = field(default_factory=Counter)

    def add(self, other: Inspection) -> None:
        """Add the sums over other rows."""
        for name in ("rows", "masked", "chunks", "kept", "positions"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.masked_by_t += other.masked_by_t
        self.likelihoods += other.likelihoods
        for t, mass in other.mass.items():
            self.mass[t] = self.mass.get(t, 0.0) + mass
        self.chunk_tokens.update(other.chunk_tokens)
        self.bytes_by_column.update(other.bytes_by_column)


def inspect_cache(folder: Path) -> Inspection:
    """Read every finished shard of the cache at `folder`, in several processes. TideError where it is no cache."""
    manifest = load_manifest(folder)
    layout, units = manifest.layout(folder), finished_units(folder)
    found = Inspection(manifest, units)
    for part in in_processes(partial(_inspect_shard, folder, manifest, layout), units, "inspect"):
        found.add(part)
    if found.positions:
        found.mass = {t: total / found.positions for t, total in found.mass.items()}
        found.kept /= found.positions
    return found


def _inspect_shard(folder: Path, manifest: Manifest, layout: Layout, unit: Unit) -> Inspection:
    """The sums over one shard."""
    path = unit.path(folder)
    found = Inspection(manifest, [unit])
    content = path.read_bytes()
    found.bytes_by_column.update(column_bytes(content))
    for row in read_shard(path, layout, content):
        _count(found, row)
        if row.topk_sizes is not None and row.tail_odds is not None:
            found.kept += int(row.topk_sizes.sum())
            found.positions += row.topk_sizes.size
            inside = (1 / (1 + np.exp(row.tail_odds.astype(np.float64)))).sum(axis=0)
            for t, mass in zip(manifest.temperatures, inside.tolist(), strict=True):
                found.mass[t] = found.mass.get(t, 0.0) + mass
    return found


def _count(found: Inspection, row: CacheRow) -> None:
    bucket = min(4, int(row.t * 5))
    found.rows += 1
    found.masked += row.masked.size
    found.masked_by_t[bucket] += row.masked.size
    if row.chunk_logp is None or row.chunk_student is None or row.chunk_teacher is None:
        return
    found.chunks += row.chunk_logp.size
    sizes = np.stack(
        [np.diff(row.chunk_teacher, axis=1)[:, 0], np.diff(row.chunk_student, axis=1)[:, 0]], axis=1
    )
    found.chunk_tokens.update(map(tuple, sizes.tolist()))
    # Intervals are open to the left, so that a log-likelihood of exactly 0 falls into the last one.
    places = np.clip(np.searchsorted(LOGP_EDGES, row.chunk_logp, side="left") - 1, 0, 6)
    found.likelihoods[bucket] += np.bincount(places, minlength=7)


def describe(found: Inspection) -> str:
    """The inspection in words and small tables."""
    manifest, fingerprint = found.manifest, found.manifest.fingerprint
    teacher, units = fingerprint.teacher, len(manifest.units())
    lines = [
        f"teacher {teacher.name} ({teacher.architecture}, {teacher.attention['type']}), engine "
        f"{fingerprint.engine.type} in {fingerprint.engine.dtype}",
        f"{len(found.units)} of {units} shards, {manifest.draws} draws of {manifest.examples:,} examples",
        f"{found.rows:,} rows, {found.masked:,} masked positions, {found.chunks:,} chunks",
    ]
    if found.mass:
        masses = ", ".join(f"{mass:.3f} at T = {t:g}" for t, mass in found.mass.items())
        targets = fingerprint.targets
        tail = f"{targets.classes} classes" if targets.classes > 1 else "one class"
        lines.append(f"top-k: {found.kept:.1f} logits a position, teacher mass {masses}")
        lines.append(
            f"tail: {tail}, shaped by the {targets.tail}; values as {targets.values}"
        )
    if found.chunks:
        common = ", ".join(
            f"{t}:{s} {n / found.chunks:.1%}" for (t, s), n in found.chunk_tokens.most_common(6)
        )
        lines.append(f"chunks, teacher tokens : student tokens: {common}")
    lines += ["", "by t              masked   share of chunks with log p(c) in nats"]
    labels = [f"≤{edge:g}" for edge in LOGP_EDGES[1:]]
    lines.append(" " * 26 + "".join(f"{label:>8}" for label in labels))
    for i in range(5):
        of_all = found.likelihoods[i] / max(1, found.likelihoods[i].sum())
        shares = "".join(f"{share:>8.1%}" for share in of_all) if found.chunks else ""
        lines.append(
            f"{T_EDGES[i]:.1f} to {T_EDGES[i + 1]:.1f} {found.masked_by_t[i]:>15,}{shares}"
        )
    total = sum(found.bytes_by_column.values())
    lines += [
        "",
        f"bytes on disk by column: {total:,}, {total / max(1, found.masked):.0f} a masked position",
    ]
    for name, size in found.bytes_by_column.most_common():
        lines.append(
            f"  {name:<16}{size:>14,}{size / max(1, total):>8.1%}{size / max(1, found.masked):>9.1f}"
        )
    return "\n".join(lines)
