"""How finely a cached top-k logit is kept: as a float16, rounded where only the far tail would notice.

What is stored is log p = logit − logsumexp at T = 1, so float16 is finest where p is near 1. From −log p = 1 on it is
rounded to a grid as well: to 1/512, from 2 to 1/128, from 4 to 1/32 nat. A logit is then within 0.0157 nats down to
p = e⁻⁶⁴ (below, within float16's own 0.1 %), the mass of a top-64 within 0.002; and half of the low bytes are zeros,
which zstd makes use of.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

LARGEST_ERROR = 1 / 64
"""Nats, down to p = e⁻⁶⁴."""


def round_logp(logp: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Log-probabilities in float16, on the grid."""
    drop = np.minimum(-logp.astype(np.float32), 60000.0)
    steps = np.select([drop >= 4, drop >= 2, drop >= 1], [32.0, 128.0, 512.0], 0.0).astype(np.float32)
    rounded = np.where(steps > 0, np.round(drop * steps) / np.maximum(steps, 1), drop)
    return (-rounded).astype(np.float16)
