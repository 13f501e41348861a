"""The cache's row: all that stage two needs of one draw of one example.

On its way to disk and back: a row's arrays (here) → columns of many rows, in small integers
(`levels`) → a file (`shards`). docs/cache-format.md says how to read that file without this
package. Beside the rows a cache holds tables of the teacher as a whole, made once before the first
shard.
"""

import hashlib
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Int8

SCHEMA_VERSION = 5


@dataclass(frozen=True)
class TokenMap:
    """What a teacher's tokens read in the student's (`shared.aligned.token_map`): entry i says that
    of the student tokens which a teacher token `token` owns at `place`, `share` are `student`.
    """

    token: Int[np.ndarray, " entries"]
    place: Int[np.ndarray, " entries"]
    student: Int[np.ndarray, " entries"]
    share: Float[np.ndarray, " entries"]
    teacher_bytes: Int[np.ndarray, " teacher_vocab"]  # lengths of all tokens
    student_bytes: Int[np.ndarray, " student_vocab"]


@dataclass(frozen=True)
class Tables:
    """What is known of the teacher as a whole: how the logits outside of a top-k follow from a few
    coefficients of its last hidden state h (docs/method.md).

    code = encoder · (h − center), kept in steps of `step` (0: exactly). With b the calibration,
    logit(v) / T = (mean_v + Σ_j code_j · scales_j · directions_vj) / T + b_T(v) + a level.
    """

    rank_of: Int[np.ndarray, " vocab"]  # by how often a token is in a top-k
    shared: Bool[np.ndarray, " vocab"]  # ids that mean the same to both sides
    mean: Float[np.ndarray, " vocab"]
    calibration: Float[np.ndarray, "temperatures vocab"]
    directions: Int8[np.ndarray, "vocab rank"]
    scales: Float[np.ndarray, " rank"]
    encoder: Float[np.ndarray, "rank width"]
    center: Float[np.ndarray, " width"]
    step: float
    token_map: TokenMap | None = None  # where the teacher has a tokenizer of its own

    @property
    def rank(self) -> int:
        return self.scales.size

    @property
    def unit(self) -> float:
        """What 1 in a code as it is kept stands for: a step, or 1 where codes are exact."""
        return self.step or 1.0

    @cached_property
    def ids_by_rank(self) -> Int[np.ndarray, " vocab"]:
        """The inverse of `rank_of`."""
        return np.argsort(self.rank_of).astype(self.rank_of.dtype)

    @property
    def digest(self) -> str:
        digest = hashlib.sha256(np.float64(self.step).tobytes())
        for part in filter(None, (self, self.token_map)):
            for field in fields(part):
                if isinstance(value := getattr(part, field.name), np.ndarray):
                    digest.update(np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()[:32]

    def cut(self, rank: int) -> "Tables":
        """With the first `rank` coefficients, which matter most."""
        parts = {"directions": self.directions[:, :rank], "scales": self.scales[:rank]}
        return replace(self, encoder=self.encoder[:rank], **parts)


@dataclass(frozen=True)
class Layout:
    """How the numbers of a position lie in a cache: what its shards are read and written by."""

    temperatures: tuple[float, ...]
    values: Literal["levels", "float32"] = "levels"
    tables: Tables | None = None  # None where no top-k is cached
    partial: bool = False
    """The teacher, of the student's tokenizer, may be read at fewer positions than are masked."""

    @property
    def rank(self) -> int:
        """Coefficients of the tail; 0 where no top-k is cached."""
        return 0 if self.tables is None else self.tables.rank


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
    topk_sizes: Int[np.ndarray, " read"] | None = None
    topk_ids: Int[np.ndarray, " kept"] | None = None
    topk_logp: Float[np.ndarray, " kept"] | None = None
    # The tail: its coefficients, or their number of steps where they are kept in steps, and at each
    # temperature its level, on the scale of log p / T (`Tables`).
    tail_code: Float[np.ndarray, "read rank"] | Int8[np.ndarray, "read rank"] | None = None
    tail_level: Float[np.ndarray, "read temperatures"] | None = None
    # Active chunks: start and end in tokens of each side, and log p(c).
    chunk_student: Int[np.ndarray, "chunks 2"] | None = None
    chunk_teacher: Int[np.ndarray, "chunks 2"] | None = None
    chunk_logp: Float[np.ndarray, " chunks"] | None = None
    # those of `masked` at which a teacher of the same tokenizer was read; None: all of them
    read: Int[np.ndarray, " read"] | None = None

    @property
    def asked(self) -> Int[np.ndarray, " read"]:
        """The student's positions at which a teacher of the same tokenizer was read."""
        return self.masked if self.read is None else self.read

    @property
    def chunks(self) -> Int[np.ndarray, "chunks 4"] | None:
        """The active chunks: start and end, the teacher's, then the student's."""
        if self.chunk_teacher is None or self.chunk_student is None:
            return None
        return np.concatenate([self.chunk_teacher, self.chunk_student], axis=1)

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
