"""Classes of the vocabulary: tokens that a head treats alike, by k-means of its rows under cosine distance."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import architecture_of, head_rows
from shared.system.errors import TideError
from teacher_cache.run.plan import CachePlan

_ROUNDS = 30


def classes_for(
    plan: CachePlan,
) -> tuple[Int[np.ndarray, " vocab"], Float[np.ndarray, "classes width"]]:
    """The class of every id of the teacher's vocabulary (−1: not shared), and the classes' centres.

    From the head of `targets.classes_from`, else the teacher's own. TideError where tokens are fewer than classes.
    """
    targets, allowed = plan.config.targets, np.ones(plan.checkpoint.embedding_rows, bool)
    shared = plan.shared_ids()
    if shared is not None:
        allowed[:] = False
        allowed[: len(shared)] = shared[: allowed.size]
    if targets.classes == 1:
        return np.where(allowed, 0, -1).astype(np.int32), np.zeros((1, 1), np.float32)
    if targets.classes_from is None:
        rows = head_rows(plan.checkpoint, plan.entry.architecture)
    else:
        checkpoint = open_checkpoint(resolve(targets.classes_from))
        rows = head_rows(checkpoint, architecture_of(checkpoint))
    if len(rows) <= int(np.flatnonzero(allowed).max()):
        raise TideError(
            f"targets.classes_from {targets.classes_from} has a head of {len(rows):,} rows",
            expected=f"a row for each of the {int(allowed.sum()):,} tokens that student and teacher share",
            fix="name the student's checkpoint, or leave it out",
        )
    return cluster(rows, allowed, targets.classes)


def cluster(
    rows: Float[Tensor, "rows width"], allowed: Bool[np.ndarray, " vocab"], classes: int
) -> tuple[Int[np.ndarray, " vocab"], Float[np.ndarray, "classes width"]]:
    """k-means over the unit vectors of the `allowed` rows; the same every time."""
    from sklearn.cluster import KMeans

    if classes > allowed.sum():
        raise TideError(
            f"targets.classes is {classes}, and there are {int(allowed.sum())} tokens",
            fix="lower it: --set targets.classes=1",
        )
    chosen = np.flatnonzero(allowed)
    unit = F.normalize(rows[chosen], dim=1).numpy()
    means: Any = KMeans(classes, n_init="auto", max_iter=_ROUNDS, random_state=0).fit(unit)
    class_of = np.full(allowed.size, -1, np.int32)
    class_of[chosen] = means.labels_
    # From the labels, not from the library, whose sums depend on the number of threads.
    centres = [unit[means.labels_ == c].mean(axis=0, dtype=np.float64) for c in range(classes)]
    return class_of, np.stack(centres).astype(np.float32)
