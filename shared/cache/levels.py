"""How finely numbers are kept: as small integers ("levels"), where no objective would notice.

Every rounding is uniform in the quantity whose error costs the same everywhere. With p the
teacher's probability of a token and KL the divergence of what is stored from the truth, a step h in
log p costs p·h²/24. So * a top-k probability is kept as round(N · p^a), a = 1/(2·T), for the
hottest cached T: steps grow as p falls, and cost the same at every rank when the distribution is
heated to T; * a class's mass M outside of the top-k as round(32 · √M), for each temperature: the
same rule at the temperature at which it is used. Classes that round to 0 are taken to be as the
prior says, and at most half a level; * the tail's mass as a whole as its log-odds, on a grid of
1/256 nat: exact from either side.
"""

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor

# Levels a nat of the tail's log-odds, the gold token's log p, and logsumexp.
ODDS_STEPS, GOLD_STEPS, LOGIT_STEPS = 256, 512, 32
LARGEST_ODDS = 64.0  # nats: a tail of e⁻⁶⁴ is empty, and the same for a top-k
CLASS_LEVELS = 32
EMPTY = -1e30
"""Log-mass of what holds nothing. Finite: 0 · (EMPTY − EMPTY) is 0 where 0 · (−∞ + ∞) is NaN."""


def grid(values: Float[np.ndarray, "*shape"], steps: int) -> Int[np.ndarray, "*shape"]:
    """Integers on a uniform grid of 1/steps."""
    return np.rint(np.clip(values, -1e6, 1e6) * steps).astype(np.int32)


def top_levels(temperatures: tuple[float, ...]) -> int:
    """N, the level of p = 1: 256 where no temperature is above 2."""
    return round(128 * max(2.0, *temperatures))


def top_exponent(temperatures: tuple[float, ...]) -> float:
    """a, the power of probabilities that is kept in equal steps."""
    return 1.0 / (2.0 * max(2.0, *temperatures))


def to_levels(
    logp: Float[np.ndarray, " n"], temperatures: tuple[float, ...]
) -> Int[np.ndarray, " n"]:
    """Levels of log-probabilities: round(N · p^a), at least 1."""
    scaled = top_levels(temperatures) * np.exp(logp * np.float32(top_exponent(temperatures)))
    return np.maximum(np.rint(scaled), 1).astype(np.int32)


def level_table(temperatures: tuple[float, ...]) -> Float[np.ndarray, " levels"]:
    """log p = log(level / N) / a of every level; that of 0 is never looked up."""
    n = top_levels(temperatures)
    levels = np.maximum(np.arange(n + 1), 1) / n
    return (np.log(levels) / top_exponent(temperatures)).astype(np.float32)


def half_steps(
    logp: Float[np.ndarray, "*shape"], temperatures: tuple[float, ...]
) -> Float[np.ndarray, "*shape"]:
    """By how much rounding to levels may have moved these log-probabilities, in nats."""
    a = top_exponent(temperatures)
    below = np.maximum(np.exp(a * logp.astype(np.float64)) - 0.5 / top_levels(temperatures), 1e-12)
    return logp - np.log(below) / a


def falls_of(
    levels: Int[np.ndarray, " kept"],
    sizes: Int[np.ndarray, " lists"],
    temperatures: tuple[float, ...],
) -> Int[np.ndarray, " kept"]:
    """By how much each level of a list is below the one before it, and the first below N."""
    before = np.concatenate([[0], levels])[: levels.size]
    before[(np.cumsum(sizes) - sizes)[sizes > 0]] = top_levels(temperatures)
    return before - levels


def levels_of(
    falls: Integer[np.ndarray, " kept"],
    sizes: Int[np.ndarray, " lists"],
    temperatures: tuple[float, ...],
) -> Int[np.ndarray, " kept"]:
    """The inverse of `falls_of`."""
    below = np.cumsum(falls, dtype=np.int32)
    starts = np.cumsum(sizes) - sizes
    before = np.concatenate([[0], below])[starts].astype(np.int32)
    below -= np.repeat(before, sizes)
    return np.subtract(top_levels(temperatures), below, out=below)


def to_class_levels(log_mass: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Levels of classes' log-masses: round(32 · √M)."""
    return np.rint(CLASS_LEVELS * np.exp(0.5 * log_mass)).astype(np.uint8)


def class_log_mass(
    levels: UInt8[Tensor, "*n classes"], odds: Float[Tensor, "*n"], prior: Float[Tensor, " classes"]
) -> Float[Tensor, "*n classes"]:
    """Log-masses of classes from their levels; they add up to the tail, whose log-odds are `odds`.

    `prior`: each class's share of the mean tail.
    """
    # 1. M = (level / 32)²; at level 0 what the prior says, and at most half a level
    tail = torch.sigmoid(odds)[..., None]
    mass = (levels.to(tail.dtype) / CLASS_LEVELS).square()
    small = torch.minimum(tail * prior, torch.full_like(tail, (0.5 / CLASS_LEVELS) ** 2))
    mass = torch.where(levels > 0, mass, small)
    # 2. scaled to the tail, which is known exactly
    whole = mass.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    log_tail = torch.nn.functional.logsigmoid(odds)[..., None]
    return (mass.log() - whole.log() + log_tail).clamp_min(EMPTY)
