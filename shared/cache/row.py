"""The cache's row: all that stage two needs of one draw of one example (DESIGN §6).

Lists are flat: `spans` and `chunk_student` hold start, end, start, end, …; `topk_*` hold `topk_sizes[i]` entries for
position i, `tail_odds` one value a position and temperature, `class_mass` one a position, temperature and class, in
this order. How a row becomes columns is in `shared.cache.columns`; docs/cache-format.md says how to read them without this
package.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from shared.cache.vocabulary import Vocabulary

SCHEMA_VERSION = 4


@dataclass(frozen=True)
class Layout:
    """How numbers of a position lie in a cache: what reading and writing its shards needs besides the files."""

    temperatures: tuple[float, ...]
    values: Literal["levels", "float32"] = "levels"
    vocabulary: Vocabulary | None = None
    """None where no top-k is cached."""
    partial: bool = False
    """The teacher, of the student's tokenizer, may be read at fewer positions than are masked."""

    @property
    def classes(self) -> int:
        """Classes of the tail; 1 where it is stored as a whole."""
        return 1 if self.vocabulary is None else self.vocabulary.classes


@dataclass(frozen=True)
class CacheRow:
    """One row as arrays. Optional parts are None where they are not cached."""

    example_id: str
    label: str
    draw: int
    t: float
    student_ids: Int[np.ndarray, " length"]
    spans: Int[np.ndarray, "spans 2"]
    masked: Int[np.ndarray, " masked"]
    teacher_ids: Int[np.ndarray, " teacher_length"] | None
    teacher_masked: Int[np.ndarray, " read"] | None
    split: Bool[np.ndarray, " read"]
    gold_logp: Float[np.ndarray, " read"]
    """log p of the true token over all of the teacher's logits, in nats at T = 1."""
    logsumexp: Float[np.ndarray, " read"]
    """Over the logits of shared ids, at T = 1: logit = log p + logsumexp."""
    topk_sizes: Int[np.ndarray, " read"] | None
    topk_ids: Int[np.ndarray, " kept"] | None
    """The likeliest first; shared ids only."""
    topk_logp: Float[np.ndarray, " kept"] | None
    """Over shared ids, in nats at T = 1."""
    tail_odds: Float[np.ndarray, "read temperatures"] | None
    """Log-odds of the mass outside the top-k."""
    class_mass: Shaped[np.ndarray, "read temperatures classes"] | None
    """Each class's mass outside the top-k: log-masses, or levels (uint8, see `shared.cache.levels`); None for C = 1."""
    chunk_student: Int[np.ndarray, "chunks 2"] | None
    chunk_teacher: Int[np.ndarray, "chunks 2"] | None
    chunk_logp: Float[np.ndarray, " chunks"] | None
    read: Int[np.ndarray, " read"] | None = None
    """Those of `masked` at which a teacher of the same tokenizer was read; None: all of them."""

    @property
    def prompt_length(self) -> int:
        """Where the first response begins; the whole length where nothing is trained."""
        return int(self.spans[0, 0]) if len(self.spans) else len(self.student_ids)

    @property
    def asked(self) -> Int[np.ndarray, " read"]:
        """The student's positions at which a teacher of the same tokenizer was read."""
        return self.masked if self.read is None else self.read

    @property
    def maskable(self) -> int:
        """How many positions may be masked."""
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())


def without_masks(row: CacheRow) -> CacheRow:
    """The same example with nothing masked and nothing maskable: it weighs nothing in any loss."""
    none, number = np.zeros(0, np.int32), np.zeros(0, np.float32)
    spans = None if row.chunk_logp is None else np.zeros((0, 2), np.int32)
    return dataclasses.replace(
        row,
        spans=np.zeros((0, 2), np.int32),
        masked=none,
        read=None if row.read is None else none,
        teacher_masked=None if row.teacher_masked is None else none,
        split=np.zeros(0, bool),
        gold_logp=number,
        logsumexp=number,
        topk_sizes=None if row.topk_sizes is None else none,
        topk_ids=None if row.topk_ids is None else none,
        topk_logp=None if row.topk_logp is None else number,
        tail_odds=None if row.tail_odds is None else row.tail_odds[:0],
        class_mass=None if row.class_mass is None else row.class_mass[:0],
        chunk_student=spans,
        chunk_teacher=spans,
        chunk_logp=None if row.chunk_logp is None else number,
    )
