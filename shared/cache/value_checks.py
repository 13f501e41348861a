"""Does a shard say what a shard can? Every value's range, order and fit with the others.

Checksums tell that bytes are what was written; this tells that what was written can be trained on.
`tide verify` reports what is found here, and training refuses it. A rule is a column, whether it
holds, and a sentence; they are tried in order, since later ones lean on earlier ones.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shared.cache import levels
from shared.cache.manifest import Manifest
from shared.cache.row import Layout
from shared.cache.shards import Shard, read_table
from shared.diffusion import TIME_EPSILON
from shared.system.files import TideError

VERSION = 4
"""Raised when a rule is added: caches that passed before are looked at again."""
Rule = tuple[str, bool | np.bool_, str]
_NEAR_ZERO = 1e-3  # nats by which rounding may lift a log-probability above 0
_MASS_SLACK = 0.03  # by how much rounding may move a top-k's mass
_TOPK = ("topk_sizes", "topk_ranks", "topk_logp", "tail_code", "tail_level")
_CHUNKS = ("chunk_student", "chunk_teacher", "chunk_logp")
_NO_SPANS = "are not spans in order, apart, inside of the tokens"
_NO_POSITIONS = "are not rising positions inside of the tokens"


class Column:
    """A list column of a shard: flat values, how many each row has, and for each value its row."""

    def __init__(self, column: pa.ListArray) -> None:
        offsets = column.offsets.to_numpy().astype(np.int64)
        self.values = levels.numbers_of(column.values)[offsets[0] : offsets[-1]]
        self.sizes = np.diff(offsets)
        self.owner = np.repeat(np.arange(self.sizes.size), self.sizes)

    def rises(self, by: int) -> bool:
        """Whether each value is at least that much above the one before it in its row."""
        step = np.diff(self.values.astype(np.int64))
        return bool((step[np.diff(self.owner) == 0] >= by).all())

    def are_positions(self, lengths: np.ndarray) -> bool:
        """Whether they are places in rows of these lengths, in order."""
        inside = self.values.min(initial=0) >= 0 and (self.values < lengths[self.owner]).all()
        return bool(inside) and self.rises(1)

    def are_spans(self, lengths: np.ndarray) -> bool:
        """Whether they are pairs of start and end in rows of these lengths, in order and apart."""
        if (self.sizes % 2).any() or not self.rises(0):
            return False
        start, end = self.values.reshape(-1, 2).T
        inside = start.min(initial=0) >= 0 and (end <= lengths[self.owner[::2]]).all()
        return bool(inside and (start < end).all())

    def masked_in(self, lengths: np.ndarray, masked: "Column") -> np.ndarray:
        """How many masked positions each span holds."""
        base = np.cumsum(lengths) - lengths  # where each row begins
        marks = np.zeros(lengths.sum() + 1, np.int64)
        marks[base[masked.owner] + masked.values + 1] = 1
        before = np.cumsum(marks)  # masked positions before each token
        pairs = self.values.reshape(-1, 2) + base[self.owner[::2]][:, None]
        return before[pairs[:, 1]] - before[pairs[:, 0]]


def problem_in(table: pa.Table, layout: Layout, manifest: Manifest) -> str | None:
    """What is wrong with a shard's values, in words: the first rule that is broken, or nothing."""
    for name, holds, sentence in _rules(table, layout, manifest) if table.num_rows else ():
        if not holds:
            return f"{name} {sentence}"
    return None


def sound(path: Path, layout: Layout, manifest: Manifest, content: bytes | None = None) -> Shard:
    """`read_table`. TideError also where its values cannot be."""
    shard = read_table(path, layout, content, manifest.digest)
    try:
        problem = problem_in(shard.table, layout, manifest)
    except (IndexError, TypeError, ValueError) as error:
        problem = f"cannot be read: {error}"
    if problem:
        raise TideError(f"shard {path}: {problem}", fix="`tide verify --delete-damaged` removes it")
    return shard


def _rules(table: pa.Table, layout: Layout, manifest: Manifest) -> Iterator[Rule]:
    yield from _row_rules(table, layout, manifest)
    known, own = manifest.fingerprint, table.column("teacher_ids").is_valid().to_numpy()
    student_tokens, topk = known.teacher.student_tokens, "topk" in known.targets.signals

    @cache
    def column(name: str) -> Column:
        return Column(table.column(levels.column_name(name, layout)).combine_chunks())

    # 1. tokens, and where they are masked
    for name, side in (("student_ids", known.student), ("teacher_ids", known.teacher)):
        ids = column(name).values
        inside = ids.min(initial=0) >= 0 and ids.max(initial=0) < side.vocabulary
        yield name, inside, "holds an id outside of the vocabulary"
    lengths, most = column("student_ids").sizes, known.lengths.student + known.lengths.block
    fits = lengths.min() > 0 and lengths.max() <= most
    yield "student_ids", fits, "has a row without tokens, or with more than lengths.student allows"
    spans, masked = column("spans"), column("masked")
    yield "spans", spans.are_spans(lengths), _NO_SPANS
    yield "masked", masked.are_positions(lengths), _NO_POSITIONS
    asked = column("read") if layout.partial else masked
    yield "read", asked.are_positions(lengths), _NO_POSITIONS
    # A row where the teacher has no tokens of its own is read in the student's.
    teacher_lengths, read = np.where(own, column("teacher_ids").sizes, lengths), asked
    if own.any():
        of_student = table.column("read" if layout.partial else "masked")
        places = pc.call_function("coalesce", [table.column("teacher_masked"), of_student])
        read = Column(places.combine_chunks())
    yield "teacher_masked", read.are_positions(teacher_lengths), _NO_POSITIONS
    of_row = np.bincount(spans.owner[::2], spans.masked_in(lengths, masked), table.num_rows)
    yield "masked", (of_row == masked.sizes).all(), "holds a position outside of the spans"
    base = np.cumsum(lengths) - lengths
    among = np.isin(base[asked.owner] + asked.values, base[masked.owner] + masked.values)
    yield "read", among.all(), "holds a position that is not masked"

    # 2. what is kept of the teacher, position by position
    one_each = "does not have one value a position that the teacher read"
    for name in ("split", "gold_logp", "logsumexp", *(["topk_sizes"] if topk else [])):
        yield name, (column(name).sizes == read.sizes).all(), one_each
    split, gold = column("split"), column("gold_logp").values
    all_asked = not student_tokens or (split.sizes == asked.sizes).all()
    yield "split", all_asked, "has another number of positions than the student's"
    in_demo = known.noise.comp_demo or not split.values.any()
    yield "split", in_demo, "is set in a cache without CompDemo"
    for name in ("gold_logp", "logsumexp", "chunk_logp"):
        yield name, np.isfinite(column(name).values).all(), "has values that are not finite"
    logp = gold if layout.values == "float32" else gold / -levels.GOLD_STEPS
    yield "gold_logp", logp.max(initial=0) <= _NEAR_ZERO, "is above 0"
    if topk:
        yield from _topk_rules(column, layout, known.targets.k)

    # 3. chunks, masked whole on both sides
    chunk_logp = column("chunk_logp")
    yield "chunk_logp", chunk_logp.values.max(initial=0) <= _NEAR_ZERO, "is above 0"
    sides = (("chunk_student", lengths, masked), ("chunk_teacher", teacher_lengths, read))
    for name, side_lengths, places in sides:
        chunks = column(name)
        yield name, chunks.are_spans(side_lengths), _NO_SPANS
        counted = (chunks.sizes == 2 * chunk_logp.sizes).all()
        yield name, counted, "does not have one span a likelihood"
        tokens = np.diff(chunks.values.reshape(-1, 2), axis=1)[:, 0]
        whole = (chunks.masked_in(side_lengths, places) == tokens).all()
        yield name, whole, "has a chunk that is not masked whole"


def _row_rules(table: pa.Table, layout: Layout, manifest: Manifest) -> Iterator[Rule]:
    """Optional columns are there where the manifest says so, and each row is one that may be."""
    signals, rows = manifest.signals, table.num_rows
    wanted = {"read": layout.partial}
    wanted |= dict.fromkeys(_TOPK, "topk" in signals) | dict.fromkeys(_CHUNKS, "chunks" in signals)
    unlike = "is missing, or there, unlike the manifest says"
    for name, there in wanted.items():
        stored = levels.column_name(name, layout)
        nulls = table.column(stored).null_count if stored in table.column_names else rows
        yield name, nulls == (0 if there else rows), unlike
    own = table.column("teacher_ids").is_valid()
    agree = own.equals(table.column("teacher_masked").is_valid())
    yield "teacher_ids", agree and (manifest.shared_tokenizer or own.to_numpy().all()), unlike
    t = table.column("t").to_numpy()
    in_time = t.min() >= 0.999 * np.float32(TIME_EPSILON) and t.max() <= 1
    yield "t", in_time, f"has a time outside of [{TIME_EPSILON}, 1]"
    yield "example_id", len(table.column("example_id").unique()) == rows, "has an example twice"


def _topk_rules(column: Callable[[str], Column], layout: Layout, k: int) -> Iterator[Rule]:
    """Lists of shared ids, each once, that fall, and a tail for each."""
    exact, tables, temperatures = layout.values == "float32", layout.tables, layout.temperatures
    lists, ranks = column("topk_sizes"), column("topk_ranks").values
    sizes = lists.values
    # 1. as many entries as are said, of shared ids
    fit = 1 <= sizes.min(initial=1) <= sizes.max(initial=1) <= k
    yield "topk_sizes", fit, "has a list that is empty, or longer than k"
    of_row = np.bincount(lists.owner, sizes, lists.sizes.size)
    for name in ("topk_ranks", "topk_logp"):
        as_many = (of_row == column(name).sizes).all()
        yield name, as_many, "does not have as many entries as topk_sizes says"
    smallest, largest, shared = ranks.min(initial=0), ranks.max(initial=0), False
    if tables is not None and 0 <= smallest <= largest < tables.rank_of.size:
        shared = tables.shared[tables.ids_by_rank[ranks]].all()
    yield "topk_ranks", shared, "holds an id that student and teacher do not share"
    # A rectangle, a list a row; what a list lacks is filled with numbers that are all different.
    width = sizes.max(initial=1)
    square = np.broadcast_to(-1 - np.arange(width, dtype=np.int32), (sizes.size, width)).copy()
    square[np.arange(width) < sizes[:, None]] = ranks
    square.sort(axis=1)
    yield "topk_ranks", (square[:, 1:] != square[:, :-1]).all(), "has an id twice in a list"
    # 2. log p falls from at most 0
    logp = column("topk_logp").values
    if not exact:
        level, table = levels.levels_of(logp, sizes, temperatures), levels.level_table(temperatures)
        known = (level >= 1) & (level < table.size)
        logp = np.where(known, table[np.where(known, level, 1)], np.nan)
    owner = np.repeat(np.arange(sizes.size), sizes)
    falls = np.isfinite(logp).all() and (np.diff(logp)[np.diff(owner) == 0] <= 0).all()
    falls = falls and logp.max(initial=0) <= _NEAR_ZERO
    yield "topk_logp", falls, "does not fall from at most 0 along a list, or is not finite"
    mass = np.bincount(owner, np.exp(logp), sizes.size)
    yield "topk_logp", mass.max(initial=0) <= 1 + _MASS_SLACK, "has a list of more mass than 1"
    # 3. the tail: (positions, rank), (positions, temperatures)
    code, level = column("tail_code"), column("tail_level")
    each = code.values.size == lists.values.size * layout.rank
    each = each and (code.sizes == lists.sizes * (layout.rank if exact else 1)).all()
    yield "tail_code", each, "does not have one row of coefficients a position"
    yield "tail_code", np.isfinite(code.values).all(), "has values that are not finite"
    each = (level.sizes == lists.sizes * len(temperatures)).all()
    yield "tail_level", each, "does not have one value a position and temperature"
    largest = levels.LARGEST_LEVEL * (1 if exact else levels.TAIL_STEPS)
    inside = (np.abs(level.values.astype(np.float64)) <= largest).all()
    yield "tail_level", inside, f"lies outside of ±{levels.LARGEST_LEVEL:g}"
