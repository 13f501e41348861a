"""What a cache knows of the teacher's vocabulary: classes, priors, and the order of its ids.

One row an id in `tables/vocabulary.parquet`; computed once, before the first shard, and part of the
fingerprint. The pilot sample that it comes from lies beside it, so that the table for a smaller k
follows from it (`tide prune`).
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from shared.cache.parquet import read_parquet, write_parquet
from shared.system.errors import TideError

TABLES = "tables"
_FILE, _PILOT, _CENTROIDS = "vocabulary.parquet", "pilot.parquet", "centroids.parquet"
_MEND = "delete the folder `tables` and run the same `tide cache` command again: it makes it anew"
SMALLEST_PRIOR = 1e-30


@dataclass(frozen=True)
class Vocabulary:
    """What is known of each token id.

    `class_of`: its class in the tail, −1 where student and teacher do not share it. `rank_of`: its
    rank by how often it is in a top-k. `prior`: the teacher's mean probability outside its top-k at
    each cached temperature.
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
    ) -> "Vocabulary":
        """From a sample: its sums of probabilities outside the top-k, and the ids in its lists."""
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
        shares = []
        for prior in self.prior:
            mass = np.bincount(self.class_of[self.shared], prior[self.shared], self.classes)
            shares.append(mass / max(mass.sum(), SMALLEST_PRIOR))
        return np.stack(shares).astype(np.float32)

    @property
    def digest(self) -> str:
        """A hash over the whole table."""
        digest = hashlib.sha256()
        for part, kind in ((self.class_of, "<i4"), (self.rank_of, "<i4"), (self.prior, "<f4")):
            digest.update(np.ascontiguousarray(part, kind).tobytes())
        return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Pilot:
    """What the teacher said at some thousand positions.

    Lists are flat, `sizes[i]` entries for position i.
    """

    sizes: Int[np.ndarray, " n"]
    ids: Int[np.ndarray, " kept"]
    logp: Float[np.ndarray, " kept"]  # nats, at T = 1
    odds: Float[np.ndarray, "n temperatures"]  # log-odds of the tail's mass


def save_tables(
    folder: Path,
    vocabulary: Vocabulary,
    pilot: Pilot,
    centroids: Float[np.ndarray, "classes width"],
) -> None:
    """Write all of it; the vocabulary, which says that the rest is there, comes last."""

    def lists(sizes: np.ndarray, values: np.ndarray) -> pa.ListArray:
        ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(ends), pa.array(values.reshape(-1)))

    def rows(values: np.ndarray) -> pa.ListArray:
        return lists(np.full(len(values), values.shape[1]), values)

    sample = {
        "topk_ids": lists(pilot.sizes, pilot.ids),
        "topk_logp": lists(pilot.sizes, pilot.logp),
        "tail_odds": rows(pilot.odds),
    }
    write_parquet(folder / _PILOT, pa.table(sample))
    write_parquet(folder / _CENTROIDS, pa.table({"centroid": rows(centroids.astype(np.float32))}))
    columns = {"class": vocabulary.class_of, "rank": vocabulary.rank_of}
    columns |= {f"prior_{i}": prior for i, prior in enumerate(vocabulary.prior)}
    write_parquet(folder / _FILE, pa.table({n: pa.array(v) for n, v in columns.items()}))


def has_tables(cache: Path) -> bool:
    """Whether the table is there."""
    return (cache / TABLES / _FILE).exists()


def load_vocabulary(cache: Path, digest: str | None = None) -> Vocabulary:
    """The table of the cache. TideError where it is damaged, or not the one of `digest`."""
    path = cache / TABLES / _FILE
    table = read_parquet(path, _MEND)
    try:
        names = [name for name in table.column_names if name.startswith("prior_")]
        prior = np.stack([table.column(name).to_numpy() for name in names])
        class_of, rank_of = (
            table.column(name).to_numpy().astype(np.int32) for name in ("class", "rank")
        )
    except (KeyError, ValueError) as error:
        raise TideError(f"{path} has other columns: {error}", fix=_MEND) from error
    vocabulary = Vocabulary(class_of, rank_of, prior)
    if digest is not None and vocabulary.digest != digest:
        raise TideError(
            f"{path} is not the table that the shards were written with ({vocabulary.digest})",
            expected=f"the table that the manifest names ({digest})",
            fix=f"copy {path.parent} again from where the cache came from, or build it again",
        )
    return vocabulary


def load_pilot(cache: Path) -> Pilot:
    """The pilot sample. TideError where it is damaged."""
    table = read_parquet(cache / TABLES / _PILOT, _MEND)
    ids, logp, odds = (
        table.column(name).combine_chunks() for name in ("topk_ids", "topk_logp", "tail_odds")
    )
    sizes = np.diff(ids.offsets.to_numpy()).astype(np.int32)
    tail = odds.values.to_numpy().reshape(len(sizes), -1)
    return Pilot(sizes, ids.values.to_numpy(), logp.values.to_numpy(), tail)


def load_centroids(cache: Path) -> Float[np.ndarray, "classes width"]:
    """The classes' centres. TideError where they are damaged."""
    column = read_parquet(cache / TABLES / _CENTROIDS, _MEND).column("centroid").combine_chunks()
    return column.values.to_numpy().reshape(len(column), -1)


def smaller(
    vocabulary: Vocabulary,
    pilot: Pilot,
    temperatures: tuple[float, ...],
    k: int,
    merged: Int[np.ndarray, " classes"],
) -> tuple[Vocabulary, Pilot]:
    """The table for the first `k` entries of every list, its class c now part of `merged[c]`."""
    n = pilot.sizes.size
    # 1. the pilot's entries that leave their lists for the tail
    owner = np.repeat(np.arange(n), pilot.sizes)
    rank = np.arange(pilot.ids.size) - np.repeat(np.cumsum(pilot.sizes) - pilot.sizes, pilot.sizes)
    dropped = rank >= k
    # 2. their probability joins the prior and the tail's odds, at each temperature
    prior, odds = vocabulary.prior.astype(np.float64), pilot.odds.astype(np.float64)
    for i, temperature in enumerate(temperatures):
        p = top_probabilities(pilot.logp, owner, pilot.odds[:, i], temperature)
        prior[i] += np.bincount(pilot.ids[dropped], p[dropped], prior.shape[1]) / max(1, n)
        inside = np.maximum(np.bincount(owner[~dropped], p[~dropped], n), 1e-300)
        outside = 1 / (1 + np.exp(-odds[:, i])) + np.bincount(owner[dropped], p[dropped], n)
        odds[:, i] = np.log(outside) - np.log(inside)
    # 3. classes of classes; ranks by the shorter lists
    class_of = np.where(vocabulary.shared, merged[np.maximum(vocabulary.class_of, 0)], -1)
    sizes = np.minimum(pilot.sizes, k).astype(np.int32)
    cut = Pilot(sizes, pilot.ids[~dropped], pilot.logp[~dropped], odds.astype(np.float32))
    prior = prior.astype(np.float32)
    return Vocabulary(class_of.astype(np.int32), ranks(cut.ids, prior[0]), prior), cut


def top_probabilities(
    logp: Float[np.ndarray, " kept"],
    owner: Int[np.ndarray, " kept"],
    odds: Float[np.ndarray, " n"],
    temperature: float,
) -> np.ndarray:
    """Probabilities at `temperature` of list entries: log p at T = 1, and the tail's log-odds."""
    weight = np.exp(logp.astype(np.float64) / temperature)
    whole = np.bincount(owner, weight, odds.size)
    top = 1 / (1 + np.exp(odds.astype(np.float64)))  # mass of the whole list
    return weight * (top / np.maximum(whole, 1e-300))[owner]


def ranks(
    ids: Int[np.ndarray, " kept"], prior: Float[np.ndarray, " vocab"]
) -> Int[np.ndarray, " vocab"]:
    """Ids by how often they are in the pilot's lists, then by prior, then by number."""
    count = np.bincount(ids, minlength=prior.size)
    order = np.lexsort((np.arange(prior.size), -prior.astype(np.float64), -count))
    rank = np.empty(prior.size, np.int32)
    rank[order] = np.arange(prior.size, dtype=np.int32)
    return rank
