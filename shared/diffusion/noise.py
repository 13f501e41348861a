"""Everything random about a draw: the time t, the mask, the CompDemo split (DESIGN §3 and §6).

All are pure functions of (seed, example id, draw): nothing depends on the batch, the worker count or a resume.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

TIME_EPSILON = 1e-3
"""Smallest diffusion time: t lies in [TIME_EPSILON, 1)."""


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A random stream that depends on the seed and the names alone, the same on every machine."""
    digest = hashlib.blake2b(repr((int(seed), *names)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def radical_inverse(index: int) -> float:
    """The van der Corput sequence in base 2: 0, 1/2, 1/4, 3/4, … Any prefix of it is well spread over [0, 1)."""
    value, weight = 0.0, 0.5
    while index:
        value += weight * (index & 1)
        index >>= 1
        weight /= 2
    return value


def diffusion_time(seed: int, example_id: str, draw: int) -> float:
    """The time t of a draw, in [TIME_EPSILON, 1).

    Over examples t is uniform; over the draws of one example it is a van der Corput sequence, shifted by an
    offset of the example's own, so the first K draws are stratified for every K.
    """
    shift = generator(seed, example_id, "time").random()
    return TIME_EPSILON + (1.0 - TIME_EPSILON) * ((radical_inverse(draw) + shift) % 1.0)


@dataclass(frozen=True)
class Draw:
    """One draw of one example.

    `masked` are the masked student positions in rising order; `chunks` the indices of the active chunks (whole
    and masked, in rising order); `split` puts each unit (a masked token for a shared tokenizer, an active chunk
    across tokenizers) into A (True: revealed in pass 1, read in pass 2) or B (the reverse).
    """

    t: float
    masked: Int[np.ndarray, " masked"]
    chunks: Int[np.ndarray, " active"]
    split: Bool[np.ndarray, " units"]


def token_draw(
    seed: int, example_id: str, draw: int, maskable: Int[np.ndarray, " maskable"], demo_ratio: float
) -> Draw:
    """Mask each of the `maskable` positions (rising) with probability t; units of the split are masked tokens."""
    t = diffusion_time(seed, example_id, draw)
    stream = generator(seed, example_id, draw, "mask")
    masked = maskable[stream.random(maskable.size) < t].astype(np.int32)
    return Draw(
        t, masked, np.zeros(0, np.int32), _split(seed, example_id, draw, masked.size, demo_ratio)
    )


def chunk_draw(
    seed: int,
    example_id: str,
    draw: int,
    maskable: Int[np.ndarray, " maskable"],
    length: int,
    student_spans: Int[np.ndarray, "chunks 2"],
    demo_ratio: float,
) -> Draw:
    """As `token_draw`, but chunk-consistent: a chunk with a masked token is masked whole.

    Units of the split are active chunks. Chunks that hold a position that is not maskable (prompt) are never active.
    """
    base = token_draw(seed, example_id, draw, maskable, demo_ratio)
    mask, free = np.zeros(length, bool), np.zeros(length, bool)
    mask[base.masked], free[maskable] = True, True
    hits, allowed = (np.concatenate([np.zeros(1, np.int64), np.cumsum(x)]) for x in (mask, free))
    starts, ends = student_spans[:, 0], student_spans[:, 1]
    whole = allowed[ends] - allowed[starts] == ends - starts
    active = np.flatnonzero((hits[ends] > hits[starts]) & whole).astype(np.int32)
    edges = np.zeros(length + 1, np.int64)
    np.add.at(edges, starts[active], 1)
    np.add.at(edges, ends[active], -1)
    mask |= np.cumsum(edges[:-1]) > 0
    return Draw(
        base.t,
        np.flatnonzero(mask).astype(np.int32),
        active,
        _split(seed, example_id, draw, active.size, demo_ratio),
    )


def _split(
    seed: int, example_id: str, draw: int, units: int, demo_ratio: float
) -> Bool[np.ndarray, " units"]:
    return generator(seed, example_id, draw, "comp_demo").random(units) < demo_ratio
