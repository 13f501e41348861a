"""The cache's row: all that stage two needs of one draw of one example.

On its way to disk and back: a row's arrays (here) → columns of many rows (`columns`) → small
integers (`levels`) → a file (`shards`). docs/cache-format.md says how to read that file without
this package.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from shared.cache.vocabulary import Vocabulary

SCHEMA_VERSION = 4


@dataclass(frozen=True)
class Layout:
    """How the numbers of a position lie in a cache: what its shards are read and written by."""

    temperatures: tuple[float, ...]
    values: Literal["levels", "float32"] = "levels"
    vocabulary: Vocabulary | None = None  # None where no top-k is cached
    partial: bool = False
    """The teacher, of the student's tokenizer, may be read at fewer positions than are masked."""

    @property
    def classes(self) -> int:
        """Classes of the tail; 1 where it is stored as a whole."""
        return 1 if self.vocabulary is None else self.vocabulary.classes


@dataclass(frozen=True)
class CacheRow:
    """One row as arrays.

    Likelihoods are in nats at T = 1. Optional parts are None where they are not cached.
    """

    example_id: str
    label: str
    draw: int
    t: float  # diffusion time, (0, 1)
    student_ids: Int[np.ndarray, " length"]
    spans: Int[np.ndarray, "spans 2"]  # start and end of what may be masked
    masked: Int[np.ndarray, " masked"]  # the student's positions, rising
    teacher_ids: Int[np.ndarray, " teacher_length"] | None  # None: it reads the student's
    teacher_masked: Int[np.ndarray, " read"] | None
    split: Bool[np.ndarray, " read"]  # True: part A of CompDemo, read in pass 2
    # log p of the true token, over all of the teacher's logits
    gold_logp: Float[np.ndarray, " read"]
    # over the logits of shared ids: logit = log p + logsumexp
    logsumexp: Float[np.ndarray, " read"]
    # The top-k, over shared ids: a list a position, one after the other, the likeliest first.
    topk_sizes: Int[np.ndarray, " read"] | None
    topk_ids: Int[np.ndarray, " kept"] | None
    topk_logp: Float[np.ndarray, " kept"] | None
    # The tail: log-odds of the mass outside the top-k, and each class's part of it, as log-mass or
    # as it lies in a cache of levels, uint8 (`levels.class_log_mass`); None for one class.
    tail_odds: Float[np.ndarray, "read temperatures"] | None
    class_mass: Shaped[np.ndarray, "read temperatures classes"] | None
    # Active chunks: start and end in tokens of each side, and log p(c).
    chunk_student: Int[np.ndarray, "chunks 2"] | None
    chunk_teacher: Int[np.ndarray, "chunks 2"] | None
    chunk_logp: Float[np.ndarray, " chunks"] | None
    # those of `masked` at which a teacher of the same tokenizer was read; None: all of them
    read: Int[np.ndarray, " read"] | None = None

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
    empty: dict[str, np.ndarray] = {"spans": row.spans[:0]}
    for name in (
        "masked", "read", "teacher_masked", "split", "gold_logp", "logsumexp", "topk_sizes",
        "topk_ids", "topk_logp", "tail_odds", "class_mass", "chunk_student", "chunk_teacher",
        "chunk_logp",
    ):  # fmt: skip
        values = getattr(row, name)
        if values is not None:
            empty[name] = values[:0]
    return dataclasses.replace(row, **empty)
