"""One request's scores as one float32 tensor, the only thing that a vLLM pooler can send back.

Columns: log p of the gold token, logsumexp, size of the top-k, ids, log p, the tail's log-odds at each temperature, the
classes' log-masses. Ids and sizes stay below 2²⁴ and are exact in float32.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from teacher_cache.method.targets import Reading, Scores, TargetSpec, scores_of


def columns(spec: TargetSpec) -> int:
    """Width of a packed row."""
    return sum(_widths(spec))


def _widths(spec: TargetSpec) -> list[int]:
    t = len(spec.temperatures)
    if not spec.k:
        return [1, 1, 1, 0, 0, 0, 0]
    return [1, 1, 1, spec.k, spec.k, t, t * spec.classes if spec.classes > 1 else 0]


def pack(reading: Reading) -> Float[Tensor, "read columns"]:
    """What `targets.extract` returns, side by side."""
    cells = [reading.gold_logp[:, None], reading.logsumexp[:, None], reading.sizes[:, None], reading.ids,
             reading.logp, reading.odds, reading.class_mass.flatten(1)]  # fmt: skip
    return torch.cat([cell.float() for cell in cells], dim=1)


def unpack(packed: Float[Tensor, "read columns"], spec: TargetSpec) -> Scores:
    """The inverse, as arrays of their own."""
    cells = np.split(packed.float().numpy(), np.cumsum(_widths(spec))[:-1], axis=1)
    gold, logsumexp, sizes = (cell[:, 0].copy() for cell in cells[:3])
    ids, logp, odds, mass = (cell.copy() for cell in cells[3:])
    mass = mass.reshape(len(mass), len(spec.temperatures), -1)
    return scores_of([gold, logsumexp, sizes, ids, logp, odds, mass], spec)
