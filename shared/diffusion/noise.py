"""Everything random about a draw: the time t, the mask, the CompDemo split.

All are pure functions of (seed, example id, draw): nothing depends on the batch, the worker count
or a resume.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

TIME_EPSILON = 1e-3  # the smallest diffusion time: t lies in [TIME_EPSILON, 1)


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A random stream that depends on the seed and the names alone, the same on every machine."""
    digest = hashlib.blake2b(repr((int(seed), *names)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def radical_inverse(index: int) -> float:
    """The van der Corput sequence in base 2: 0, 1/2, 1/4, 3/4, … Any prefix of it is well spread
    over [0, 1).
    """
    value, weight = 0.0, 0.5
    while index:
        value += weight * (index & 1)
        index >>= 1
        weight /= 2
    return value


def diffusion_time(seed: int, example_id: str, draw: int) -> float:
    """The time t of a draw, in [TIME_EPSILON, 1).

    Over examples t is uniform; over the draws of one example it is a van der Corput sequence,
    shifted by an offset of the example's own, so the first K draws are stratified for every K.
    """
    shift = generator(seed, example_id, "time").random()
    return TIME_EPSILON + (1.0 - TIME_EPSILON) * ((radical_inverse(draw) + shift) % 1.0)


@dataclass(frozen=True)
class Draw:
    """One draw of one example.

    `masked` are the masked student positions, `chunks` the numbers of the active chunks, both
    rising. `split` puts each unit (a masked token for a shared tokenizer, an active chunk across
    tokenizers) into A (True: revealed in pass 1, read in pass 2) or B (the reverse).
    """

    t: float
    masked: Int[np.ndarray, " masked"]
    chunks: Int[np.ndarray, " active"]
    split: Bool[np.ndarray, " units"]


def token_draw(
    seed: int, example_id: str, draw: int, maskable: Int[np.ndarray, " maskable"], demo_ratio: float
) -> Draw:
    """Mask each of the `maskable` positions (rising) with probability t; units: masked tokens."""
    t = diffusion_time(seed, example_id, draw)
    chances = generator(seed, example_id, draw, "mask").random(maskable.size)
    masked = maskable[chances < t].astype(np.int32)
    split = generator(seed, example_id, draw, "comp_demo").random(masked.size) < demo_ratio
    return Draw(t, masked, np.zeros(0, np.int32), split)


def chunk_draw(
    seed: int,
    example_id: str,
    draw: int,
    maskable: Int[np.ndarray, " maskable"],
    length: int,
    student_spans: Int[np.ndarray, "chunks 2"],
    demo_ratio: float,
) -> Draw:
    """As `token_draw`, but chunk-consistent: a chunk with a masked token is masked whole. Units are
    active chunks; one that holds a position that is not maskable (prompt) is never active.
    """
    # 1. Tokens are masked one by one.
    tokens = token_draw(seed, example_id, draw, maskable, demo_ratio)
    mask, may_mask = np.zeros(length, bool), np.zeros(length, bool)
    mask[tokens.masked] = True
    may_mask[maskable] = True
    # 2. Active chunks, by the number of masked and of maskable positions before each position.
    starts, ends = student_spans[:, 0], student_spans[:, 1]
    masked_before = np.concatenate([[0], np.cumsum(mask)])
    maskable_before = np.concatenate([[0], np.cumsum(may_mask)])
    hit = masked_before[ends] > masked_before[starts]
    all_maskable = maskable_before[ends] - maskable_before[starts] == ends - starts
    active = np.flatnonzero(hit & all_maskable).astype(np.int32)
    # 3. They are masked whole: inside of one, more chunks have begun than have ended.
    edges = np.zeros(length + 1, np.int64)
    np.add.at(edges, starts[active], 1)
    np.add.at(edges, ends[active], -1)
    mask |= np.cumsum(edges[:-1]) > 0
    # 4. The split, one chance a chunk.
    split = generator(seed, example_id, draw, "comp_demo").random(active.size) < demo_ratio
    return Draw(tokens.t, np.flatnonzero(mask).astype(np.int32), active, split)
