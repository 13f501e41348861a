"""The cache's row: all that stage two needs of one draw of one example.

On its way to disk and back: a row's arrays (here) → columns of many rows, in small integers
(`levels`) → a file (`shards`). docs/cache-format.md says how to read that file without this
package. Beside the rows a cache holds a table of the teacher's vocabulary, made once before the
first shard, and the pilot sample that it comes from.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

SCHEMA_VERSION = 4
_SMALLEST_PRIOR = 1e-30


@dataclass(frozen=True)
class Vocabulary:
    """What is known of each of the teacher's token ids."""

    class_of: Int[np.ndarray, " vocab"]  # in the tail; −1 where student and teacher do not share it
    rank_of: Int[np.ndarray, " vocab"]  # by how often it is in a top-k
    prior: Float[np.ndarray, "temperatures vocab"]  # mean probability outside of the top-k

    @classmethod
    def of(
        cls,
        class_of: Int[np.ndarray, " vocab"],
        outside: Float[np.ndarray, "temperatures vocab"],
        positions: int,
        listed: Int[np.ndarray, " kept"],
    ) -> "Vocabulary":
        """From a sample: its sums of probabilities outside the top-k, and the ids in its lists."""
        mean = (outside / max(1, positions)).astype(np.float32)
        prior = np.where(class_of >= 0, np.maximum(mean, _SMALLEST_PRIOR), 0).astype(np.float32)
        return cls(class_of, ranks(listed, prior[0]), prior)

    @property
    def shared(self) -> Bool[np.ndarray, " vocab"]:
        """Ids that mean the same to both sides."""
        return self.class_of >= 0

    @property
    def classes(self) -> int:
        return int(self.class_of.max()) + 1

    @cached_property
    def ids_by_rank(self) -> Int[np.ndarray, " vocab"]:
        """The inverse of `rank_of`."""
        return np.argsort(self.rank_of).astype(self.rank_of.dtype)

    @cached_property
    def class_prior(self) -> Float[np.ndarray, "temperatures classes"]:
        """Each class's share of the mean tail, by temperature."""
        shares = []
        for prior in self.prior:
            mass = np.bincount(self.class_of[self.shared], prior[self.shared], self.classes)
            shares.append(mass / max(mass.sum(), _SMALLEST_PRIOR))
        return np.stack(shares).astype(np.float32)

    @property
    def digest(self) -> str:
        """A hash over the whole table."""
        digest = hashlib.sha256()
        for part, kind in ((self.class_of, "<i4"), (self.rank_of, "<i4"), (self.prior, "<f4")):
            digest.update(np.ascontiguousarray(part, kind).tobytes())
        return digest.hexdigest()[:32]


def ranks(
    ids: Int[np.ndarray, " kept"], prior: Float[np.ndarray, " vocab"]
) -> Int[np.ndarray, " vocab"]:
    """Ids by how often they are in the pilot's lists, then by prior, then by number."""
    count = np.bincount(ids, minlength=prior.size)
    order = np.lexsort((np.arange(prior.size), -prior.astype(np.float64), -count))
    return np.argsort(order).astype(np.int32)


@dataclass(frozen=True)
class Pilot:
    """What the teacher said at some thousand positions. Lists are flat, `sizes[i]` entries each."""

    sizes: Int[np.ndarray, " n"]
    ids: Int[np.ndarray, " kept"]
    logp: Float[np.ndarray, " kept"]  # nats, at T = 1
    odds: Float[np.ndarray, "n temperatures"]  # log-odds of the tail's mass


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
    empty = {}
    for name, value in vars(row).items():
        if isinstance(value, np.ndarray) and name not in ("student_ids", "teacher_ids"):
            empty[name] = value[:0]
    return replace(row, **empty)
