"""What is kept of the teacher's logits at one row: top-k, logsumexp at each temperature, the gold logit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shared.errors import TideError


@dataclass(frozen=True)
class Scores:
    """The teacher at the read positions of one request. `topk_*` are None where the signal is not asked for."""

    gold_logit: Float[np.ndarray, " read"]
    logsumexp: Float[np.ndarray, "read temperatures"]
    topk_sizes: Int[np.ndarray, " read"] | None
    topk_ids: Int[np.ndarray, "read k"] | None
    topk_logits: Float[np.ndarray, "read k"] | None


@dataclass(frozen=True)
class TargetSpec:
    """Which numbers to take: `k` is 0 where no top-k is cached."""

    k: int
    mass: float
    temperatures: tuple[float, ...]


def extract(
    logits: Float[Tensor, "read vocab"],
    gold: Int[Tensor, " read"],
    spec: TargetSpec,
    excluded: Int[Tensor, " excluded"] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(gold logit, logsumexp, sizes, ids, logits), all on the logits' device; float32 before any exp.

    `sizes` is the shortest prefix of the sorted top-k whose mass at the largest temperature reaches `spec.mass`.
    Ids in `excluded` (those that mean something else to the student) are never in the top-k; logsumexp counts
    them, so their mass belongs to the tail.
    """
    logits = logits.float()
    lse = torch.stack([torch.logsumexp(logits / t, dim=1) for t in spec.temperatures], dim=1)
    gold_logit = logits.gather(1, gold[:, None]).squeeze(1)
    if excluded is not None and excluded.numel():
        logits = logits.index_fill(1, excluded, -torch.inf)
    values, ids = torch.topk(logits, spec.k, dim=1) if spec.k else (logits[:, :0], gold[:, None][:, :0])
    sizes = torch.full_like(gold, spec.k)
    if spec.k and spec.mass < 1.0:
        hottest = spec.temperatures[-1]
        mass = torch.exp(values / hottest - lse[:, -1:]).cumsum(dim=1)
        sizes = ((mass < spec.mass).sum(dim=1) + 1).clamp_max(spec.k)
    return gold_logit, lse, sizes, ids, values


def excluded_ids(shared: Bool[np.ndarray, " ids"], vocabulary: int) -> Int[np.ndarray, " excluded"]:
    """Ids below `vocabulary` that mean something else, or nothing, to the student."""
    allowed = np.zeros(vocabulary, bool)
    allowed[: len(shared)] = shared[:vocabulary]
    return np.flatnonzero(~allowed)


def refuse_nonfinite(scores: Scores, example_id: str) -> None:
    """Raise TideError where the teacher returned NaN or infinity for an example."""
    bad = ~(np.isfinite(scores.gold_logit) & np.isfinite(scores.logsumexp).all(axis=1))
    if scores.topk_logits is not None:
        bad |= ~np.isfinite(scores.topk_logits).all(axis=1)
    if bad.any():
        raise TideError(
            f"the teacher returned {int(bad.sum())} non-finite rows of {bad.size} for example {example_id}",
            expected="finite logits",
            fix="use engine.dtype=bfloat16 or float32 instead of float16, and check the checkpoint; "
            "finished shards are kept",
        )
