"""Does a shard say what a shard can? Every value's range, order and consistency with the others, without the teacher.

Checksums tell that bytes are what was written; this tells that what was written can be trained on. All is done on whole
columns. `tide verify` reports what is found here, and training refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from shared.columns import column_name, levels_of
from shared.compact import CLASS_LEVELS, GOLD_STEPS, LARGEST_ODDS, ODDS_STEPS, level_table
from shared.manifest import Manifest
from shared.noise import TIME_EPSILON
from shared.schema import Layout

RULES = 1
"""Raised when a rule is added: caches that passed before are looked at again."""
_MASS_SLACK = 0.03
"""How far rounding may move a top-k's mass."""
_NEAR_ZERO = 1e-3


@dataclass(frozen=True)
class Column:
    """A list column as flat values and where each row's begin."""

    values: np.ndarray
    offsets: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Values of each row."""
        return np.diff(self.offsets)

    @property
    def owner(self) -> np.ndarray:
        """The row of each value."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.sizes)


class _Columns:
    def __init__(self, table: pa.Table, layout: Layout, manifest: Manifest) -> None:
        self.table, self.layout, self.manifest = table, layout, manifest

    def has(self, name: str) -> bool:
        """Whether the column holds anything but nulls."""
        column = self.table.column(column_name(name, self.layout))
        return column.null_count < len(column)

    def __getitem__(self, name: str) -> Column:
        column = self.table.column(column_name(name, self.layout)).combine_chunks()
        offsets = column.offsets.to_numpy().astype(np.int64)
        values = column.values.to_numpy(zero_copy_only=False)
        return Column(values[offsets[0] : offsets[-1]], offsets - offsets[0])


def problems_in(table: pa.Table, layout: Layout, manifest: Manifest) -> list[str]:
    """What is wrong with a shard's values, in words; empty where nothing is."""
    if not table.num_rows:
        return []
    columns = _Columns(table, layout, manifest)
    nulls = list(_nulls(columns))
    if nulls:
        return nulls
    found: list[str] = []
    for rule in (_rows, _positions, _scores, _lists, _tail, _chunks):
        found += rule(columns)
        if found:  # later rules lean on what earlier ones have established
            return found
    return found


def _nulls(columns: _Columns) -> Iterator[str]:
    manifest = columns.manifest
    topk, chunks = "topk" in manifest.signals, "chunks" in manifest.signals
    wanted: dict[str, bool] = dict.fromkeys(("topk_sizes", "topk_ranks", "topk_logp", "tail_odds"), topk)
    wanted |= dict.fromkeys(("chunk_student", "chunk_teacher", "chunk_logp"), chunks)
    wanted["class_mass"] = topk and columns.layout.classes > 1
    for name, present in wanted.items():
        nulls = columns.table.column(column_name(name, columns.layout)).null_count
        if nulls != (0 if present else columns.table.num_rows):
            yield f"{name} is {'missing' if present else 'there'}, unlike the manifest says"
    ids, masked = (columns.table.column(n).null_count for n in ("teacher_ids", "teacher_masked"))
    if ids != masked or (not manifest.shared_tokenizer and ids):
        yield "teacher_ids and teacher_masked are missing where they are needed"


def _rows(columns: _Columns) -> Iterator[str]:
    table, manifest = columns.table, columns.manifest
    t = table.column("t").to_numpy()
    if not (np.isfinite(t).all() and (t >= np.float32(TIME_EPSILON) * 0.999).all() and (t <= 1).all()):
        yield f"a time t lies outside [{TIME_EPSILON}, 1): {t.min()} to {t.max()}"
    if len(set(table.column("example_id").to_pylist())) != table.num_rows:
        yield "an example stands in it twice"
    for side in ("student", "teacher"):
        if side == "teacher" and not columns.has("teacher_ids"):
            continue
        ids, limit = columns[f"{side}_ids"].values, int(manifest.fingerprint[side]["vocabulary"])
        if ids.size and not (ids.min() >= 0 and ids.max() < limit):
            yield f"{side}_ids holds {ids.min() if ids.min() < 0 else ids.max()}, and the vocabulary has {limit:,} ids"
    longest = manifest.fingerprint["lengths"]["student"] + manifest.fingerprint["lengths"]["block"]
    sizes = columns["student_ids"].sizes
    if not (sizes.min() > 0 and sizes.max() <= longest):
        yield f"student_ids has {sizes.min()} to {sizes.max()} tokens in a row, and {longest} are the most"


def _rising(column: Column, strict: bool = True) -> bool:
    """Whether the values of each row rise."""
    step = np.diff(column.values.astype(np.int64))
    same = np.ones(step.size, bool)
    ends = column.offsets[1:-1]
    same[ends[(ends > 0) & (ends < column.values.size)] - 1] = False
    return bool((step[same] > 0).all() if strict else (step[same] >= 0).all())


def _spans_hold(spans: Column, lengths: np.ndarray) -> str | None:
    """Why pairs of start and end are no spans, apart and in order, of rows of these lengths."""
    if (spans.sizes % 2).any():
        return "an odd number of ends"
    pairs = spans.values.reshape(-1, 2)
    if (pairs[:, 0] >= pairs[:, 1]).any():
        return "a span that ends before it begins"
    if not _rising(spans, strict=False):
        return "spans that are out of order or overlap"
    limit = np.repeat(lengths, spans.sizes // 2)
    return "a span outside of the tokens" if pairs.size and (pairs.min() < 0 or (pairs[:, 1] > limit).any()) else None


def _marked(column: Column, lengths: np.ndarray) -> np.ndarray:
    """How many of the positions in `column` lie before each place of the rows put one after the other."""
    base = np.concatenate([[0], np.cumsum(lengths)])
    marks = np.zeros(base[-1] + 1, np.int64)
    marks[base[column.owner] + column.values + 1] = 1
    return np.cumsum(marks)


def _inside(spans: Column, marks: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How many marked positions each span holds."""
    base = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    owner = np.repeat(np.arange(len(spans.sizes)), spans.sizes // 2)
    pairs = spans.values.reshape(-1, 2) + base[owner][:, None]
    return marks[pairs[:, 1]] - marks[pairs[:, 0]]


def _positions(columns: _Columns) -> Iterator[str]:
    lengths, masked, spans = columns["student_ids"].sizes, columns["masked"], columns["spans"]
    wrong = _spans_hold(spans, lengths)
    if wrong:
        yield f"spans: {wrong}"
        return
    sides = {"masked": (masked, lengths)}
    if columns.has("teacher_ids"):
        sides["teacher_masked"] = (columns["teacher_masked"], columns["teacher_ids"].sizes)
    for name, (column, limit) in sides.items():
        if column.values.size and (column.values.min() < 0 or (column.values >= limit[column.owner]).any()):
            yield f"{name} holds a position outside of the tokens"
        elif not _rising(column):
            yield f"{name} is not rising"
        else:
            continue
        return
    held = np.bincount(np.repeat(np.arange(len(lengths)), spans.sizes // 2),
                       _inside(spans, _marked(masked, lengths), lengths), len(lengths))  # fmt: skip
    if (held != masked.sizes).any():
        yield "masked holds a position outside of the spans"
    read = sides["teacher_masked" if "teacher_masked" in sides else "masked"][0].sizes
    if (columns["split"].sizes != read).any():
        yield "split does not have one value a position that the teacher read"
    if columns.manifest.shared_tokenizer and (read != masked.sizes).any():
        yield "teacher_masked and masked differ in number"
    if not columns.manifest.fingerprint["noise"]["comp_demo"] and columns["split"].values.any():
        yield "split is set in a cache without CompDemo"


def _scores(columns: _Columns) -> Iterator[str]:
    read = columns["split"].sizes
    for name in ("gold_logp", "logsumexp"):
        column = columns[name]
        if (column.sizes != read).any():
            yield f"{name} does not have one value a position"
        elif not np.isfinite(column.values).all():
            yield f"{int((~np.isfinite(column.values)).sum())} values of {name} are not finite"
    gold, exact = columns["gold_logp"].values, columns.layout.values == "float32"
    logp = gold if exact else gold.astype(np.float64) / -GOLD_STEPS
    if gold.size and logp.max() > _NEAR_ZERO:
        yield f"gold_logp is above 0: {logp.max():.4g}"


def _lists(columns: _Columns) -> Iterator[str]:
    if not columns.has("topk_sizes"):
        return
    layout, read = columns.layout, columns["split"].sizes
    sizes, ranks, logp = columns["topk_sizes"], columns["topk_ranks"], columns["topk_logp"]
    assert layout.vocabulary is not None
    most = columns.manifest.fingerprint["targets"]["k"]
    if (sizes.sizes != read).any():
        yield "topk_sizes does not have one value a position"
    elif sizes.values.size and (sizes.values.min() < 1 or sizes.values.max() > most):
        yield f"topk_sizes holds {sizes.values.min()} to {sizes.values.max()}, and k is {most}"
    elif any((np.bincount(sizes.owner, sizes.values, len(read)) != c.sizes).any() for c in (ranks, logp)):
        yield "topk_sizes, topk_ranks and topk_logp do not fit"
    else:
        shared = int(layout.vocabulary.shared.sum())
        if ranks.values.size and (ranks.values.min() < 0 or ranks.values.max() >= layout.vocabulary.rank_of.size):
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
        square = -1 - np.broadcast_to(np.arange(width, dtype=ranks.dtype), (sizes.size, width)).copy()
        square[np.arange(width) < sizes[:, None]] = ranks
    ordered = np.sort(square, axis=1)
    return bool((ordered[:, 1:] == ordered[:, :-1]).any())


def _falling(columns: _Columns, sizes: np.ndarray, stored: np.ndarray) -> Iterator[str]:
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
        if logp.max(initial=0.0) > _NEAR_ZERO or (np.diff(logp)[~starts[1:]] > 0).any():
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


def _tail(columns: _Columns) -> Iterator[str]:
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


def _chunks(columns: _Columns) -> Iterator[str]:
    if not columns.has("chunk_logp"):
        return
    logp = columns["chunk_logp"]
    if not np.isfinite(logp.values).all():
        yield f"{int((~np.isfinite(logp.values)).sum())} values of chunk_logp are not finite"
    elif logp.values.max(initial=0.0) > _NEAR_ZERO:
        yield f"chunk_logp is above 0: {logp.values.max():.4g}"
    own = columns.has("teacher_ids")
    sides = {
        "student": (columns["student_ids"].sizes, columns["masked"]),
        "teacher": (columns["teacher_ids" if own else "student_ids"].sizes,
                    columns["teacher_masked" if own else "masked"]),
    }  # fmt: skip
    for side, (lengths, masked) in sides.items():
        spans = columns[f"chunk_{side}"]
        wrong = _spans_hold(spans, lengths)
        if wrong is None and (spans.sizes != 2 * logp.sizes).any():
            wrong = "not one span a likelihood"
        if wrong is None:
            held = _inside(spans, _marked(masked, lengths), lengths)
            if (held != np.diff(spans.values.reshape(-1, 2), axis=1)[:, 0]).any():
                wrong = "a span that is not masked whole"
        if wrong:
            yield f"chunk_{side}: {wrong}"
