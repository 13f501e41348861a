"""`tide inspect CACHE --picture FILE`: a cache at a glance."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")

from matplotlib import pyplot as plt

from shared.system.atomic import write_bytes
from teacher_cache.maintenance.inspect import LOGP_EDGES, T_EDGES, Inspection


def draw_picture(found: Inspection, path: Path) -> None:
    """Likelihoods of chunks by t, chunk lengths, masked positions by t, bytes by column."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    teacher = found.manifest.fingerprint.teacher.name
    figure.suptitle(
        f"{teacher}: {found.rows:,} rows, {found.masked:,} masked positions, {found.chunks:,} chunks"
    )
    bands = [f"{a:.1f} to {b:.1f}" for a, b in itertools.pairwise(T_EDGES)]
    _likelihoods(axes[0, 0], found, bands)
    _lengths(axes[0, 1], found)
    axes[1, 0].bar(bands, found.masked_by_t)
    axes[1, 0].set(title="masked positions by t", xlabel="t")
    sizes = found.bytes_by_column.most_common(8)[::-1]
    axes[1, 1].barh([name for name, _ in sizes], [size / max(1, found.masked) for _, size in sizes])
    axes[1, 1].set(title="bytes a masked position by column")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    plt.close(figure)
    write_bytes(path, content.getvalue())


def _likelihoods(axis: Any, found: Inspection, bands: list[str]) -> None:
    labels = [f"≤ {edge:g}" for edge in LOGP_EDGES[1:]]
    for counts, band in zip(found.likelihoods, bands, strict=True):
        if counts.sum():
            axis.plot(labels, counts / counts.sum(), marker="o", markersize=3, label=f"t {band}")
    axis.set(title="share of chunks by log p(c), nats", xlabel="log p(c)")
    if found.chunks:
        axis.legend(frameon=False)


def _lengths(axis: Any, found: Inspection) -> None:
    counts = np.zeros((4, 4))
    for (teacher, student), n in found.chunk_tokens.items():
        counts[min(teacher, 4) - 1, min(student, 4) - 1] += n
    share = counts / max(1.0, counts.sum())
    axis.imshow(share, cmap="Blues", vmin=0)
    for (row, column), value in np.ndenumerate(share):
        axis.text(
            column,
            row,
            f"{value:.1%}",
            ha="center",
            va="center",
            color="white" if value > 0.4 else "black",
        )
    names = ["1", "2", "3", "4+"]
    axis.set(
        title="tokens of a chunk",
        xlabel="student",
        ylabel="teacher",
        xticks=range(4),
        yticks=range(4),
    )
    axis.set_xticklabels(names)
    axis.set_yticklabels(names)
