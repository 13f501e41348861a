"""One request's scores as one float32 tensor, the only thing that a vLLM pooler can send back.

Columns: gold logit, logsumexp at each temperature, size of the top-k, ids, logits. Ids and sizes stay below 2²⁴ and
are exact in float32.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from teacher_cache.targets import Scores, TargetSpec


def columns(spec: TargetSpec) -> int:
    """Width of a packed row."""
    return 2 + len(spec.temperatures) + 2 * spec.k


def pack(parts: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> Float[Tensor, "read columns"]:
    """What `targets.extract` returns, side by side."""
    gold, logsumexp, sizes, ids, logits = parts
    return torch.cat([gold[:, None], logsumexp, sizes[:, None].float(), ids.float(), logits], dim=1)


def unpack(packed: Float[Tensor, "read columns"], spec: TargetSpec) -> Scores:
    """The inverse, as arrays of their own."""
    table = packed.float().numpy()
    t = len(spec.temperatures)
    gold, logsumexp = table[:, 0].copy(), table[:, 1 : 1 + t].copy()
    if not spec.k:
        return Scores(gold, logsumexp, None, None, None)
    sizes, ids = table[:, 1 + t], table[:, 2 + t : 2 + t + spec.k]
    logits = table[:, 2 + t + spec.k :].copy()
    return Scores(gold, logsumexp, sizes.astype(np.int32), ids.astype(np.int32), logits)
