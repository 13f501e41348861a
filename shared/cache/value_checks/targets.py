"""Rules for what is kept of the teacher: scores, lists, tails and classes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from shared.cache.columns import levels_of
from shared.cache.levels import CLASS_LEVELS, GOLD_STEPS, LARGEST_ODDS, ODDS_STEPS, level_table
from shared.cache.row import Layout
from shared.cache.value_checks.columns import Columns
from shared.cache.value_checks.rows import NEAR_ZERO

_MASS_SLACK = 0.03
"""How far rounding may move a top-k's mass."""


def scores(columns: Columns) -> Iterator[str]:
    """One finite likelihood and logsumexp a position."""
    read = columns["split"].sizes
    for name in ("gold_logp", "logsumexp"):
        column = columns[name]
        if (column.sizes != read).any():
            yield f"{name} does not have one value a position"
        elif not np.isfinite(column.values).all():
            yield f"{int((~np.isfinite(column.values)).sum())} values of {name} are not finite"
    gold, exact = columns["gold_logp"].values, columns.layout.values == "float32"
    logp = gold if exact else gold.astype(np.float64) / -GOLD_STEPS
    if gold.size and logp.max() > NEAR_ZERO:
        yield f"gold_logp is above 0: {logp.max():.4g}"


def lists(columns: Columns) -> Iterator[str]:
    """Lists of shared ids, each once, that fall and have the mass that their tail leaves."""
    if not columns.has("topk_sizes"):
        return
    layout, read = columns.layout, columns["split"].sizes
    sizes, ranks, logp = columns["topk_sizes"], columns["topk_ranks"], columns["topk_logp"]
    assert layout.vocabulary is not None
    most = columns.manifest.fingerprint.targets.k
    if (sizes.sizes != read).any():
        yield "topk_sizes does not have one value a position"
    elif sizes.values.size and (sizes.values.min() < 1 or sizes.values.max() > most):
        yield f"topk_sizes holds {sizes.values.min()} to {sizes.values.max()}, and k is {most}"
    elif any(
        (np.bincount(sizes.owner, sizes.values, len(read)) != c.sizes).any() for c in (ranks, logp)
    ):
        yield "topk_sizes, topk_ranks and topk_logp do not fit"
    else:
        shared = int(layout.vocabulary.shared.sum())
        if ranks.values.size and (
            ranks.values.min() < 0 or ranks.values.max() >= layout.vocabulary.rank_of.size
        ):
            yield "topk_ranks holds a rank outside of the vocabulary"
        elif not layout.vocabulary.shared[layout.vocabulary.ids_by_rank[ranks.values]].all():
            yield f"topk_ranks holds an id that is not among the {shared:,} shared ones"
        elif _repeats(ranks.values, sizes.values):
            yield "a list holds the same id twice"
        else:
            yield from _falling(columns, sizes.values, logp.values)


def _repeats(ranks: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether any list holds a rank twice."""
    if not sizes.size:
        return False
    width = int(sizes.max())
    if (sizes == width).all():
        square = ranks.reshape(-1, width)
    else:
        square = (
            -1 - np.broadcast_to(np.arange(width, dtype=ranks.dtype), (sizes.size, width)).copy()
        )
        square[np.arange(width) < sizes[:, None]] = ranks
    ordered = np.sort(square, axis=1)
    return bool((ordered[:, 1:] == ordered[:, :-1]).any())


def _falling(columns: Columns, sizes: np.ndarray, stored: np.ndarray) -> Iterator[str]:
    """Log-probabilities that fall along a list, are at most 0, and have the mass that the tail leaves."""
    layout = columns.layout
    if layout.values == "levels":
        levels = levels_of(stored, sizes, layout.temperatures)
        if levels.size and levels.min() < 1:
            yield "topk_logp falls below its lowest level"
            return
        logp = level_table(layout.temperatures)[levels]
    else:
        logp = stored
        starts = np.zeros(logp.size, bool)
        starts[(np.cumsum(sizes) - sizes)] = True
        if not np.isfinite(logp).all():
            yield f"{int((~np.isfinite(logp)).sum())} values of topk_logp are not finite"
            return
        if logp.max(initial=0.0) > NEAR_ZERO or (np.diff(logp)[~starts[1:]] > 0).any():
            yield "topk_logp is above 0, or does not fall along a list"
            return
    odds = columns["tail_odds"]
    if (odds.sizes != columns["split"].sizes * len(layout.temperatures)).any():
        yield "tail_odds does not have one value a position and temperature"
        return
    at_one = _odds(odds.values, layout)[:, layout.temperatures.index(1.0)]
    ends = np.concatenate([[0.0], np.cumsum(np.exp(logp), dtype=np.float64)])
    mass = np.diff(ends[np.concatenate([[0], np.cumsum(sizes)])])
    apart = np.abs(mass - 1 / (1 + np.exp(at_one)))
    if apart.max(initial=0.0) > _MASS_SLACK:
        yield f"the mass of a top-k and that of its tail add up to {1 + apart.max():.3f} or {1 - apart.max():.3f}"


def _odds(stored: np.ndarray, layout: Layout) -> np.ndarray:
    exact = layout.values == "float32"
    values = stored.astype(np.float64) if exact else stored.astype(np.float64) / ODDS_STEPS
    return values.reshape(-1, len(layout.temperatures))


def tail(columns: Columns) -> Iterator[str]:
    """Tails grow with the temperature, and classes make the tail."""
    if not columns.has("tail_odds"):
        return
    layout = columns.layout
    odds = _odds(columns["tail_odds"].values, layout)
    if not np.isfinite(odds).all() or np.abs(odds).max(initial=0.0) > LARGEST_ODDS:
        yield f"tail_odds lies outside of ±{LARGEST_ODDS:g}"
        return
    if (np.diff(odds, axis=1) < -0.02).any():
        yield "a hotter temperature has less mass outside of the top-k"
    if layout.classes == 1:
        return
    column = columns["class_mass"]
    if (column.sizes != columns["split"].sizes * len(layout.temperatures) * layout.classes).any():
        yield "class_mass does not have one value a position, temperature and class"
        return
    tail = 1 / (1 + np.exp(-odds))
    stored = column.values.reshape(*odds.shape, layout.classes)
    if layout.values == "float32":
        whole = np.exp(np.minimum(stored, 1.0)).sum(axis=2)
        low, high = tail - 1e-3, tail + 1e-3
    else:
        # Rounding moves a root of mass by half a level: by Cauchy-Schwarz this bounds the sum of squares.
        whole = (stored.astype(np.float32) ** 2).sum(axis=2) / CLASS_LEVELS**2
        slack = np.sqrt(layout.classes) * 0.5 / CLASS_LEVELS + 1e-3
        low, high = np.maximum(np.sqrt(tail) - slack, 0) ** 2, (np.sqrt(tail) + slack) ** 2
    if not ((whole >= low) & (whole <= high)).all():
        yield "the masses of classes do not add up to the tail's"
