"""What a cache knows of the teacher's vocabulary as a whole: classes, priors, and the order in which ids are kept.

One row an id in `tables/vocabulary.parquet`; computed once, before the first shard, and part of the fingerprint. The
pilot sample that it comes from lies beside it, so that the table for a smaller k follows from it (`tide prune`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int

from shared.cache.parquet import write_parquet
from shared.system.errors import TideError

TABLES = "tables"
_FILE, _PILOT, _CENTROIDS = "vocabulary.parquet", "pilot.parquet", "centroids.parquet"
SMALLEST_PRIOR = 1e-30


@dataclass(frozen=True)
class Vocabulary:
    """By token id: its class (−1: student and teacher do not share it), its rank by how often it is in a top-k, and
    `prior`, the teacher's mean probability outside its top-k at each cached temperature.
    """

    class_of: Int[np.ndarray, " vocab"]
    rank_of: Int[np.ndarray, " vocab"]
    prior: Float[np.ndarray, "temperatures vocab"]

    @classmethod
    def of(
        cls,
        class_of: Int[np.ndarray, " vocab"],
        outside: Float[np.ndarray, "temperatures vocab"],
        positions: int,
        listed: Int[np.ndarray, " kept"],
    ) -> Vocabulary:
        """From a sample: the sums of probabilities outside the top-k over its positions, and the ids in its lists."""
        mean = (outside / max(1, positions)).astype(np.float32)
        prior = np.where(class_of >= 0, np.maximum(mean, SMALLEST_PRIOR), 0).astype(np.float32)
        return cls(class_of, ranks(listed, prior[0]), prior)

    @property
    def shared(self) -> Bool[np.ndarray, " vocab"]:
        """Ids that mean the same to both sides."""
        return self.class_of >= 0

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return int(self.class_of.max()) + 1

    @cached_property
    def ids_by_rank(self) -> Int[np.ndarray, " vocab"]:
        """The inverse of `rank_of`."""
        ids = np.empty_like(self.rank_of)
        ids[self.rank_of] = np.arange(self.rank_of.size, dtype=ids.dtype)
        return ids

    @cached_property
    def class_prior(self) -> Float[np.ndarray, "temperatures classes"]:
        """Each class's share of the mean tail, by temperature."""
        masses = [
            np.bincount(self.class_of[self.shared], row[self.shared], self.classes)
            for row in self.prior
        ]
        return np.stack([m / max(m.sum(), SMALLEST_PRIOR) for m in masses]).astype(np.float32)

    @property
    def digest(self) -> str:
        """A hash over the whole table."""
        parts = (self.class_of.astype("<i4"), self.rank_of.astype("<i4"), self.prior.astype("<f4"))
        return hashlib.sha256(
            b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
        ).hexdigest()[:32]


@dataclass(frozen=True)
class Pilot:
    """The pilot sample: what the teacher said at some thousand positions. Lists are flat, `sizes[i]` entries each."""

    sizes: Int[np.ndarray, " n"]
    ids: Int[np.ndarray, " kept"]
    logp: Float[np.ndarray, " kept"]
    """At T = 1, in nats."""
    odds: Float[np.ndarray, "n temperatures"]
    """Log-odds of the tail's mass."""


def save_tables(
    folder: Path,
    vocabulary: Vocabulary,
    pilot: Pilot,
    centroids: Float[np.ndarray, "classes width"],
) -> None:
    """Write all of it; the vocabulary, which says that the rest is there, comes last."""
    lists = pa.ListArray.from_arrays
    ends = pa.array(np.concatenate([[0], np.cumsum(pilot.sizes)]).astype(np.int32))
    write_parquet(folder / _PILOT, pa.table({
        "topk_ids": lists(ends, pa.array(pilot.ids)),
        "topk_logp": lists(ends, pa.array(pilot.logp)),
        "tail_odds": _rows(pilot.odds),
    }))  # fmt: skip
    write_parquet(folder / _CENTROIDS, pa.table({"centroid": _rows(centroids.astype(np.float32))}))
    columns: dict[str, Any] = {
        "class": pa.array(vocabulary.class_of),
        "rank": pa.array(vocabulary.rank_of),
    }
    columns |= {f"prior_{i}": pa.array(row) for i, row in enumerate(vocabulary.prior)}
    write_parquet(folder / _FILE, pa.table(columns))


def _rows(values: np.ndarray) -> pa.ListArray:
    offsets = pa.array((np.arange(len(values) + 1) * values.shape[1]).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)))


def _read(path: Path) -> pa.Table:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True).read()
    except Exception as error:  # a damaged footer leads the library anywhere
        raise TideError(
            f"{path} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}",
            expected="the table that `tide cache` wrote before the first shard",
            fix=f"delete the folder {path.parent} and run the same `tide cache` command again: it makes it anew",
        ) from error


def has_tables(cache: Path) -> bool:
    """Whether the table is there."""
    return (cache / TABLES / _FILE).exists()


def load_vocabulary(cache: Path, digest: str | None = None) -> Vocabulary:
    """The table of the cache. TideError where it is damaged, or not the one of `digest`."""
    path = cache / TABLES / _FILE
    table = _read(path)
    try:
        priors = [name for name in table.column_names if name.startswith("prior_")]
        columns = [table.column(name).to_numpy() for name in ("class", "rank", *priors)]
        found = Vocabulary(
            columns[0].astype(np.int32), columns[1].astype(np.int32), np.stack(columns[2:])
        )
    except (KeyError, ValueError) as error:
        raise TideError(
            f"{path} has another layout: {error}", fix="build the cache again"
        ) from error
    if digest is not None and found.digest != digest:
        raise TideError(
            f"{path} is not the table that the shards were written with ({found.digest} instead of {digest})",
            expected="the table that the manifest names",
            fix=f"copy {path.parent} again from where the cache came from, or build the cache again",
        )
    return found


def load_pilot(cache: Path) -> Pilot:
    """The pilot sample. TideError where it is damaged."""
    table = _read(cache / TABLES / _PILOT)
    ids, logp, odds = (
        table.column(name).combine_chunks() for name in ("topk_ids", "topk_logp", "tail_odds")
    )
    sizes = np.diff(ids.offsets.to_numpy()).astype(np.int32)
    return Pilot(
        sizes,
        ids.values.to_numpy(),
        logp.values.to_numpy(),
        odds.values.to_numpy().reshape(len(sizes), -1),
    )


def load_centroids(cache: Path) -> Float[np.ndarray, "classes width"]:
    """The classes' centres. TideError where they are damaged."""
    column = _read(cache / TABLES / _CENTROIDS).column("centroid").combine_chunks()
    return column.values.to_numpy().reshape(len(column), -1)


def smaller(
    vocabulary: Vocabulary,
    pilot: Pilot,
    temperatures: tuple[float, ...],
    k: int,
    merged: Int[np.ndarray, " classes"],
) -> tuple[Vocabulary, Pilot]:
    """The table for the first `k` entries of every list, its class c now part of `merged[c]`."""
    starts = np.cumsum(pilot.sizes) - pilot.sizes
    rank = np.arange(pilot.ids.size) - np.repeat(starts, pilot.sizes)
    owner, dropped = np.repeat(np.arange(pilot.sizes.size), pilot.sizes), rank >= k
    prior, odds = vocabulary.prior.astype(np.float64), pilot.odds.astype(np.float64).copy()
    for i, temperature in enumerate(temperatures):
        p = top_probabilities(pilot.logp, owner, pilot.odds[:, i], temperature)
        prior[i] += np.bincount(pilot.ids[dropped], p[dropped], prior.shape[1]) / max(
            1, pilot.sizes.size
        )
        inside = np.bincount(owner[~dropped], p[~dropped], pilot.sizes.size)
        moved = np.bincount(owner[dropped], p[dropped], pilot.sizes.size)
        odds[:, i] = np.log(1 / (1 + np.exp(-odds[:, i])) + moved) - np.log(
            np.maximum(inside, 1e-300)
        )
    class_of = np.where(vocabulary.shared, merged[np.maximum(vocabulary.class_of, 0)], -1).astype(
        np.int32
    )
    cut = Pilot(np.minimum(pilot.sizes, k).astype(np.int32), pilot.ids[~dropped], pilot.logp[~dropped],
                odds.astype(np.float32))  # fmt: skip
    prior32 = prior.astype(np.float32)
    return Vocabulary(class_of, ranks(cut.ids, prior32[0]), prior32), cut


def top_probabilities(
    logp: Float[np.ndarray, " kept"],
    owner: Int[np.ndarray, " kept"],
    odds: Float[np.ndarray, " n"],
    temperature: float,
) -> np.ndarray:
    """Probabilities at `temperature` of list entries, from log p at T = 1 and the tail's log-odds at `temperature`."""
    weight = np.exp(logp.astype(np.float64) / temperature)
    whole = np.bincount(owner, weight, odds.size)
    top = 1 / (1 + np.exp(odds.astype(np.float64)))
    return weight * (top / np.maximum(whole, 1e-300))[owner]


def ranks(
    ids: Int[np.ndarray, " kept"], prior: Float[np.ndarray, " vocab"]
) -> Int[np.ndarray, " vocab"]:
    """Ids by how often they stand in the pilot's lists, then by their mean probability outside, then by number."""
    count = np.bincount(ids, minlength=prior.size)
    order = np.lexsort((np.arange(prior.size), -prior.astype(np.float64), -count))
    rank = np.empty(prior.size, np.int32)
    rank[order] = np.arange(prior.size, dtype=np.int32)
    return rank
