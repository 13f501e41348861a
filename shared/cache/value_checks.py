"""Does a shard say what a shard can? Every value's range, order and fit with the others.

Checksums tell that bytes are what was written; this tells that what was written can be trained on.
`tide verify` reports what is found here, and training refuses it. A rule is a column, a check of
the whole column, and a sentence; they are tried in order, since later ones lean on earlier ones.
"""

from collections.abc import Callable
from functools import cached_property

import numpy as np
import pyarrow as pa

from shared.cache.columns import column_name
from shared.cache.levels import (
    CLASS_LEVELS,
    GOLD_STEPS,
    LARGEST_ODDS,
    ODDS_STEPS,
    level_table,
    levels_of,
)
from shared.cache.manifest import Manifest
from shared.cache.row import Layout
from shared.diffusion.noise import TIME_EPSILON

VERSION = 3
"""Raised when a rule is added: caches that passed before are looked at again."""
Truth = bool | np.bool_
_NEAR_ZERO = 1e-3  # nats by which rounding may lift a log-probability above 0
_MASS_SLACK = 0.03  # by how much rounding may move a top-k's mass


class Column:
    """A list column of a shard: flat values, and for each the row that it is of."""

    def __init__(self, column: pa.ListArray) -> None:
        self.offsets = column.offsets.to_numpy().astype(np.int64)
        values = column.values.to_numpy(zero_copy_only=False)
        self.values = values[self.offsets[0] : self.offsets[-1]]
        self.sizes = np.diff(self.offsets)
        self.owner = np.repeat(np.arange(self.sizes.size), self.sizes)

    def rises(self, by: int) -> bool:
        """Whether each value is at least that much above the one before it in its row."""
        step = np.diff(self.values.astype(np.int64))
        return bool((step[np.diff(self.owner) == 0] >= by).all())


class Columns:
    """A shard's columns, with what they are measured by."""

    def __init__(self, table: pa.Table, layout: Layout, manifest: Manifest) -> None:
        self.table, self.layout, self.known = table, layout, manifest.fingerprint
        self.exact, self.hot = layout.values == "float32", len(layout.temperatures)
        self.opened: dict[str, Column] = {}

    def nulls(self, name: str) -> int:
        """How many rows have no value in the column; all where there is no such column."""
        column = column_name(name, self.layout)
        held = column in self.table.column_names
        return self.table.column(column).null_count if held else self.table.num_rows

    def __getitem__(self, name: str) -> Column:
        if name not in self.opened:
            column = self.table.column(column_name(name, self.layout))
            self.opened[name] = Column(column.combine_chunks())
        return self.opened[name]

    @cached_property
    def student(self) -> tuple[np.ndarray, Column]:
        """The rows' lengths in the student's tokens, and the positions that it sees masked."""
        return self["student_ids"].sizes, self["masked"]

    @cached_property
    def asked(self) -> Column:
        """The student's positions at which a teacher of the same tokenizer was read."""
        return self["read" if self.layout.partial else "masked"]

    @cached_property
    def teacher(self) -> tuple[np.ndarray, Column]:
        """The rows' lengths in the teacher's tokens, and the positions at which it was read.

        A row where the teacher has no tokens of its own is read in the student's.
        """
        ids, own = self.table.column("teacher_ids").combine_chunks(), self["teacher_masked"]
        present = ids.is_valid().to_numpy(zero_copy_only=False)
        if not present.any():
            return self.student[0], self.asked
        if present.all():
            return self["teacher_ids"].sizes, own
        rows = []
        for i, mine in enumerate(present):
            places = own if mine else self.asked
            rows.append(places.values[places.owner == i].tolist())
        lengths = np.where(present, self["teacher_ids"].sizes, self.student[0])
        return lengths, Column(pa.array(rows, pa.list_(pa.int32())))

    def side(self, name: str) -> tuple[np.ndarray, Column]:
        """Lengths and masked positions of the side that a column is of."""
        return self.teacher if "teacher" in name else self.student

    @cached_property
    def odds(self) -> np.ndarray:
        """The tail's log-odds, (positions, temperatures)."""
        stored = self["tail_odds"].values.astype(np.float64)
        return (stored if self.exact else stored / ODDS_STEPS).reshape(-1, self.hot)

    @cached_property
    def logp(self) -> np.ndarray:
        """log p of all lists; NaN where a level is none."""
        stored, temperatures = self["topk_logp"].values, self.layout.temperatures
        if self.exact:
            return stored
        levels = levels_of(stored, self["topk_sizes"].values, temperatures)
        table = level_table(temperatures)
        known = (levels >= 1) & (levels < table.size)
        return np.where(known, table[np.where(known, levels, 1)], np.nan)

    def masked_in(self, name: str) -> np.ndarray:
        """How many masked positions each span of a column holds."""
        spans, (lengths, masked) = self[name], self.side(name)
        base = np.concatenate([[0], np.cumsum(lengths)])  # where each row's tokens begin
        marks = np.zeros(base[-1] + 1, np.int64)
        marks[base[masked.owner] + masked.values + 1] = 1
        before = np.cumsum(marks)  # masked positions before each token
        pairs = spans.values.reshape(-1, 2) + base[spans.owner[::2]][:, None]
        return before[pairs[:, 1]] - before[pairs[:, 0]]


def _there(c: Columns, name: str) -> Truth:
    topk, chunks = "topk" in c.known.targets.signals, "chunks" in c.known.targets.signals
    if name in ("teacher_ids", "teacher_masked"):
        ids, masked = c.nulls("teacher_ids"), c.nulls("teacher_masked")
        return ids == masked and (c.known.teacher.student_tokens or ids == 0)
    match name.partition("_")[0]:
        case "read":
            wanted = c.layout.partial
        case "chunk":
            wanted = chunks
        case "class":
            wanted = topk and c.layout.classes > 1
        case _:
            wanted = topk
    return c.nulls(name) == (0 if wanted else c.table.num_rows)


def _spans(c: Columns, name: str) -> Truth:
    spans, (lengths, _) = c[name], c.side(name)
    if (spans.sizes % 2).any() or not spans.rises(0):
        return False
    start, end = spans.values.reshape(-1, 2).T
    return (
        start.min(initial=0) >= 0
        and (start < end).all()
        and (end <= lengths[spans.owner[::2]]).all()
    )


def _positions(c: Columns, name: str) -> Truth:
    lengths, places = c.side(name)[0], c.teacher[1] if name == "teacher_masked" else c[name]
    inside = places.values.min(initial=0) >= 0 and (places.values < lengths[places.owner]).all()
    return inside and places.rises(1)


def _read_is_masked(c: Columns, name: str) -> Truth:
    read, (lengths, masked) = c[name], c.student
    base = np.cumsum(lengths) - lengths
    return np.isin(base[read.owner] + read.values, base[masked.owner] + masked.values).all()


def _shared_ids(c: Columns, name: str) -> Truth:
    vocabulary, ranks = c.layout.vocabulary, c[name].values
    if (
        vocabulary is None
        or ranks.min(initial=0) < 0
        or ranks.max(initial=0) >= vocabulary.rank_of.size
    ):
        return False
    return vocabulary.shared[vocabulary.ids_by_rank[ranks]].all()


def _each_id_once(c: Columns, name: str) -> Truth:
    sizes = c["topk_sizes"].values
    # A rectangle, a list a row; what a list lacks is filled with numbers that are all different.
    width = sizes.max(initial=1)
    square = np.broadcast_to(-1 - np.arange(width, dtype=np.int32), (sizes.size, width)).copy()
    square[np.arange(width) < sizes[:, None]] = c[name].values
    square.sort(axis=1)
    return not (square[:, 1:] == square[:, :-1]).any()


def _falling(c: Columns, _: str) -> Truth:
    sizes = c["topk_sizes"].values
    same_list = np.diff(np.repeat(np.arange(sizes.size), sizes)) == 0
    falls = (np.diff(c.logp)[same_list] <= 0).all()
    return np.isfinite(c.logp).all() and c.logp.max(initial=0) <= _NEAR_ZERO and falls


def _mass_is_one(c: Columns, _: str) -> Truth:
    ends = np.concatenate([[0.0], np.cumsum(np.exp(c.logp), dtype=np.float64)])
    mass = np.diff(ends[np.concatenate([[0], np.cumsum(c["topk_sizes"].values)])])
    tail = 1 / (1 + np.exp(-c.odds[:, c.layout.temperatures.index(1.0)]))
    return (np.abs(mass + tail - 1) <= _MASS_SLACK).all()


def _classes_make_the_tail(c: Columns, name: str) -> Truth:
    tail = 1 / (1 + np.exp(-c.odds))
    stored = c[name].values.reshape(*c.odds.shape, c.layout.classes)
    if c.exact:
        return (np.abs(np.exp(np.minimum(stored, 1.0)).sum(axis=2) - tail) <= 1e-3).all()
    # Rounding moves a root of mass by half a level; by Cauchy-Schwarz the root of the sum by this.
    root = np.sqrt((stored.astype(np.float32) ** 2).sum(axis=2)) / CLASS_LEVELS
    slack = np.sqrt(c.layout.classes) * 0.5 / CLASS_LEVELS + 1e-3
    return (np.abs(root - np.sqrt(tail)) <= slack).all()


_OPTIONAL = (
    "read teacher_ids teacher_masked topk_sizes topk_ranks topk_logp tail_odds class_mass "
    "chunk_student chunk_teacher chunk_logp"
)
_RULES: tuple[tuple[str, Callable[[Columns, str], Truth], str], ...] = (
    (_OPTIONAL, _there, "is missing, or there, unlike the manifest says"),
    # Who a row is, and where it is masked.
    ("t", lambda c, n: c.table[n].to_numpy().min() >= 0.999 * np.float32(TIME_EPSILON)
        and c.table[n].to_numpy().max() <= 1, f"has a time outside of [{TIME_EPSILON}, 1]"),
    ("example_id", lambda c, n: len(c.table[n].unique()) == len(c.table[n]),
        "has an example twice"),
    ("student_ids teacher_ids", lambda c, n: c[n].values.min(initial=0) >= 0
        and c[n].values.max(initial=0) < getattr(c.known, n[:7]).vocabulary,
        "holds an id outside of the vocabulary"),
    ("student_ids", lambda c, n: c[n].sizes.min() > 0
        and c[n].sizes.max() <= c.known.lengths.student + c.known.lengths.block,
        "has a row without tokens, or with more than lengths.student allows"),
    ("spans", _spans, "are not spans in order, apart, inside of the tokens"),
    ("masked read teacher_masked", _positions, "are not rising positions inside of the tokens"),
    ("masked", lambda c, n: (np.bincount(c["spans"].owner[::2], c.masked_in("spans"),
        len(c[n].sizes)) == c[n].sizes).all(), "holds a position outside of the spans"),
    ("read", _read_is_masked, "holds a position that is not masked"),
    # What is kept of the teacher, position by position.
    ("split gold_logp logsumexp topk_sizes", lambda c, n: (c[n].sizes == c.teacher[1].sizes).all(),
        "does not have one value a position that the teacher read"),
    ("split", lambda c, n: not c.known.teacher.student_tokens
        or (c[n].sizes == c.asked.sizes).all(),
        "has another number of positions than the student's"),
    ("split", lambda c, n: c.known.noise.comp_demo or not c[n].values.any(),
        "is set in a cache without CompDemo"),
    ("gold_logp logsumexp chunk_logp", lambda c, n: np.isfinite(c[n].values).all(),
        "has values that are not finite"),
    ("gold_logp", lambda c, n: (c[n].values if c.exact else c[n].values / -GOLD_STEPS
        ).max(initial=0) <= _NEAR_ZERO, "is above 0"),
    # Lists of shared ids, each once, that fall, and have the mass that their tail leaves.
    ("topk_sizes", lambda c, n: c[n].values.min(initial=1) >= 1
        and c[n].values.max(initial=1) <= c.known.targets.k,
        "has a list that is empty, or longer than k"),
    ("topk_ranks topk_logp", lambda c, n: (np.bincount(c["topk_sizes"].owner,
        c["topk_sizes"].values, len(c[n].sizes)) == c[n].sizes).all(),
        "does not have as many entries as topk_sizes says"),
    ("topk_ranks", _shared_ids, "holds an id that student and teacher do not share"),
    ("topk_ranks", _each_id_once, "has an id twice in a list"),
    ("topk_logp", _falling, "does not fall from at most 0 along a list, or is not finite"),
    ("tail_odds", lambda c, n: (c[n].sizes == c["split"].sizes * c.hot).all(),
        "does not have one value a position and temperature"),
    ("tail_odds", lambda c, _: (np.abs(c.odds) <= LARGEST_ODDS).all(),
        f"lies outside of ±{LARGEST_ODDS:g}"),
    ("tail_odds", _mass_is_one, "and the list's mass at T = 1 do not add up to 1"),
    ("tail_odds", lambda c, _: (np.diff(c.odds, axis=1) >= -0.02).all(),
        "has less mass at a hotter temperature"),
    ("class_mass", lambda c, n: (c[n].sizes == c["split"].sizes * c.hot * c.layout.classes).all(),
        "does not have one value a position, temperature and class"),
    ("class_mass", _classes_make_the_tail, "does not add up to the tail"),
    # Chunks, masked whole on both sides.
    ("chunk_logp", lambda c, n: c[n].values.max(initial=0) <= _NEAR_ZERO, "is above 0"),
    ("chunk_student chunk_teacher", _spans, "are not spans in order, apart, inside of the tokens"),
    ("chunk_student chunk_teacher", lambda c, n: (c[n].sizes == 2 * c["chunk_logp"].sizes).all(),
        "does not have one span a likelihood"),
    ("chunk_student chunk_teacher", lambda c, n: (c.masked_in(n)
        == np.diff(c[n].values.reshape(-1, 2), axis=1)[:, 0]).all(),
        "has a chunk that is not masked whole"),
)  # fmt: skip


def problems_in(table: pa.Table, layout: Layout, manifest: Manifest) -> list[str]:
    """What is wrong with a shard's values, in words: the first rule that is broken, or nothing."""
    columns = Columns(table, layout, manifest)
    for names, holds, sentence in _RULES:
        for name in names.split() if table.num_rows else ():
            applies = holds is _there or columns.nulls(name) < table.num_rows
            if applies and not holds(columns, name):
                return [f"{name} {sentence}"]
    return []
