"""`tide inspect`: what a cache holds, from its shards alone, in words or as a picture."""

import io
import itertools
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from shared.cache.checking import in_processes
from shared.cache.manifest import Manifest, load_manifest
from shared.cache.row import Layout
from shared.cache.shards import Unit, column_bytes, finished_units, read_shard
from shared.system.files import write_bytes

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
    positions: int = 0  # those with a top-k
    kept: int = 0  # entries of all lists
    mass: np.ndarray = field(default_factory=lambda: np.zeros(0))  # in the top-k, by temperature
    masked_by_t: np.ndarray = field(default_factory=lambda: np.zeros(5, np.int64))
    likelihoods: np.ndarray = field(default_factory=lambda: np.zeros((5, 7), np.int64))
    """Chunks by t (rows) and log-likelihood (columns, edges `LOGP_EDGES`)."""
    chunk_tokens: Counter[tuple[int, int]] = field(default_factory=Counter)
    """How many chunks have so many teacher and student tokens."""
    bytes_by_column: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Inspection") -> None:
        """Add the sums over other rows."""
        for name in (
            "rows",
            "masked",
            "chunks",
            "positions",
            "kept",
            "mass",
            "masked_by_t",
            "likelihoods",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.chunk_tokens.update(other.chunk_tokens)
        self.bytes_by_column.update(other.bytes_by_column)


def inspect_cache(folder: Path) -> Inspection:
    """Read every finished shard of the cache at `folder`, in several processes.

    TideError where it is no cache.
    """
    manifest = load_manifest(folder)
    layout, units = manifest.layout(folder), finished_units(folder)
    total = Inspection(manifest, units, mass=np.zeros(len(manifest.temperatures)))
    for part in in_processes(partial(_inspect_shard, folder, manifest, layout), units, "inspect"):
        total.add(part)
    return total


def _inspect_shard(folder: Path, manifest: Manifest, layout: Layout, unit: Unit) -> Inspection:
    """The sums over one shard."""
    path = unit.path(folder)
    content = path.read_bytes()
    sums = Inspection(manifest, [unit], mass=np.zeros(len(manifest.temperatures)))
    sums.bytes_by_column.update(column_bytes(content))
    for row in read_shard(path, layout, content):
        band = min(4, int(row.t * 5))
        sums.rows += 1
        sums.masked += row.masked.size
        sums.masked_by_t[band] += row.masked.size
        if row.topk_sizes is not None and row.tail_odds is not None:
            sums.kept += int(row.topk_sizes.sum())
            sums.positions += row.topk_sizes.size
            sums.mass += (1 / (1 + np.exp(row.tail_odds.astype(np.float64)))).sum(axis=0)
        if row.chunk_logp is None or row.chunk_student is None or row.chunk_teacher is None:
            continue
        sums.chunks += row.chunk_logp.size
        lengths = (
            np.diff(spans, axis=1)[:, 0].tolist()
            for spans in (row.chunk_teacher, row.chunk_student)
        )
        sums.chunk_tokens.update(zip(*lengths, strict=True))
        # Intervals are open to the left, so that a likelihood of exactly 0 falls into the last one.
        places = np.clip(np.searchsorted(LOGP_EDGES, row.chunk_logp, side="left") - 1, 0, 6)
        sums.likelihoods[band] += np.bincount(places, minlength=7)
    return sums


def describe(found: Inspection) -> str:
    """The inspection in words and small tables."""
    manifest, known = found.manifest, found.manifest.fingerprint
    teacher, targets = known.teacher, known.targets
    lines = [
        f"teacher {teacher.name} ({teacher.architecture}, {teacher.attention['type']}), "
        f"engine {known.engine.type} in {known.engine.dtype}",
        f"{len(found.units)} of {len(manifest.units())} shards, "
        f"{manifest.draws} draws of {manifest.examples:,} examples",
        f"{found.rows:,} rows, {found.masked:,} masked positions, {found.chunks:,} chunks",
    ]
    if found.positions:
        masses = zip((found.mass / found.positions).tolist(), manifest.temperatures, strict=True)
        shown = ", ".join(f"{mass:.3f} at T = {t:g}" for mass, t in masses)
        each = found.kept / found.positions
        lines.append(f"top-k: {each:.1f} logits a position, teacher mass {shown}")
        tail = f"{targets.classes} classes" if targets.classes > 1 else "one class"
        lines.append(f"tail: {tail}, shaped by the {targets.tail}; values as {targets.values}")
    if found.chunks:
        common = found.chunk_tokens.most_common(6)
        shown = ", ".join(f"{t}:{s} {n / found.chunks:.1%}" for (t, s), n in common)
        lines.append(f"chunks, teacher tokens : student tokens: {shown}")
    lines += ["", "by t              masked   share of chunks with log p(c) in nats"]
    lines.append(" " * 26 + "".join(f"{f'≤{edge:g}':>8}" for edge in LOGP_EDGES[1:]))
    for i, (low, high) in enumerate(itertools.pairwise(T_EDGES)):
        of_all = found.likelihoods[i] / max(1, found.likelihoods[i].sum())
        shares = "".join(f"{share:>8.1%}" for share in of_all) if found.chunks else ""
        lines.append(f"{low:.1f} to {high:.1f} {found.masked_by_t[i]:>15,}{shares}")
    total, masked = sum(found.bytes_by_column.values()), max(1, found.masked)
    lines += ["", f"bytes on disk by column: {total:,}, {total / masked:.0f} a masked position"]
    for name, size in found.bytes_by_column.most_common():
        share = size / max(1, total)
        lines.append(f"  {name:<16}{size:>14,}{share:>8.1%}{size / masked:>9.1f}")
    return "\n".join(lines)


def draw_picture(found: Inspection, path: Path) -> None:
    """As PNG: likelihoods of chunks by t, chunk lengths, masked positions by t, bytes by column."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    teacher, bands = found.manifest.fingerprint.teacher.name, []
    figure.suptitle(
        f"{teacher}: {found.rows:,} rows, {found.masked:,} masked, {found.chunks:,} chunks"
    )
    labels = [f"≤ {edge:g}" for edge in LOGP_EDGES[1:]]
    for (low, high), counts in zip(itertools.pairwise(T_EDGES), found.likelihoods, strict=True):
        bands.append(f"{low:.1f} to {high:.1f}")
        if counts.sum():
            axes[0, 0].plot(labels, counts / counts.sum(), marker="o", label=f"t {bands[-1]}")
            axes[0, 0].legend(frameon=False)
    axes[0, 0].set(title="share of chunks by log p(c), nats", xlabel="log p(c)")
    counts = np.zeros((4, 4))  # teacher's tokens, student's tokens; 4 and more in the last
    for (ours, theirs), n in found.chunk_tokens.items():
        counts[min(ours, 4) - 1, min(theirs, 4) - 1] += n
    share = counts / max(1.0, counts.sum())
    axes[0, 1].imshow(share, cmap="Blues", vmin=0)
    for (row, column), value in np.ndenumerate(share):
        color = "white" if value > 0.4 else "black"
        axes[0, 1].text(column, row, f"{value:.1%}", ha="center", va="center", color=color)
    names, ticks = ["1", "2", "3", "4+"], range(4)
    axes[0, 1].set(title="tokens of a chunk", xlabel="student", ylabel="teacher")
    axes[0, 1].set_xticks(ticks, names)
    axes[0, 1].set_yticks(ticks, names)
    axes[1, 0].bar(bands, found.masked_by_t)
    axes[1, 0].set(title="masked positions by t", xlabel="t")
    sizes = found.bytes_by_column.most_common(8)[::-1]
    each = [size / max(1, found.masked) for _, size in sizes]
    axes[1, 1].barh([name for name, _ in sizes], each)
    axes[1, 1].set(title="bytes a masked position by column")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_bytes(path, content.getvalue())
