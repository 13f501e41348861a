"""Draws of (t, mask, split), and the attention masks of block diffusion.

A draw is a pure function of (seed, example id, draw): nothing depends on the batch, the worker
count or a resume. An attention mask is True where a query (row) may look at a key (column). It is
explicit, because a model given no mask, or a 2-D padding mask, falls back to causal attention; and
padding hides keys only, never whole rows: a row that sees nothing is NaN on some GPUs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

TIME_EPSILON = 1e-3  # the smallest diffusion time: t lies in [TIME_EPSILON, 1)


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A random stream that depends on the seed and the names alone, the same on every machine."""
    digest = hashlib.blake2b(repr((int(seed), *names)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def diffusion_time(seed: int, example_id: str, draw: int) -> float:
    """The time t of a draw, in [TIME_EPSILON, 1).

    Over examples t is uniform; over the draws of one example it is a van der Corput sequence (0,
    1/2, 1/4, 3/4, …: the draw's bits behind the point, mirrored), shifted by an offset of the
    example's own, so the first K draws are stratified for every K.
    """
    van_der_corput = int(f"{draw:064b}"[::-1], 2) / 2**64
    shift = generator(seed, example_id, "time").random()
    return TIME_EPSILON + (1.0 - TIME_EPSILON) * ((van_der_corput + shift) % 1.0)


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
    whole: bool = True,
) -> Draw:
    """As `token_draw`, but chunk-consistent: a chunk with a masked token is masked whole. Units are
    active chunks; one that holds a position that is not maskable (prompt) is never active. Not
    `whole`: masks are those of `token_draw`, and a chunk is active where they cover it.
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
    there = masked_before[ends] - masked_before[starts]
    hit = there > 0 if whole else there == ends - starts
    all_maskable = maskable_before[ends] - maskable_before[starts] == ends - starts
    active = np.flatnonzero(hit & all_maskable).astype(np.int32)
    # 3. They are masked whole.
    for start, end in student_spans[active]:
        mask[start:end] = True
    # 4. The split, one chance a chunk.
    split = generator(seed, example_id, draw, "comp_demo").random(active.size) < demo_ratio
    return Draw(tokens.t, np.flatnonzero(mask).astype(np.int32), active, split)


def pad(
    sequences: Sequence[Int[np.ndarray, " _"]], multiple: int = 1
) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    """Ids, right-padded to a `multiple`, and the mask of real ones. The padding, 0, is not read."""
    shape = (len(sequences), -(-max(map(len, sequences)) // multiple) * multiple)
    ids, valid = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        copy = sequence.astype(np.int64)  # Arrow's arrays are read-only
        ids[i, : len(sequence)] = torch.from_numpy(copy)
        valid[i, : len(sequence)] = True
    return ids, valid


def full(valid: Bool[Tensor, "batch length"]) -> Bool[Tensor, "batch 1 length length"]:
    """Every position sees every real position. `valid` is False at padding."""
    batch, length = valid.shape
    return valid[:, None, None, :].expand(batch, 1, length, length)


def block_causal(
    valid: Bool[Tensor, "batch length"], block: int
) -> Bool[Tensor, "batch 1 length length"]:
    """Every position sees its own block of `block` positions and all earlier ones, but no padding.

    A padded position sees itself, so that no row is empty.
    """
    length = valid.shape[1]
    index = torch.arange(length, device=valid.device)
    seen = (index[:, None] // block >= index[None, :] // block)[None] & valid[:, None, :]
    return (seen | torch.eye(length, dtype=torch.bool, device=valid.device))[:, None]


def block_diffusion_places(
    places: Int[Tensor, "batch rows"], length: int, block: int, draws: int = 1
) -> Bool[Tensor, "batch 1 rows rows"]:
    """The block-diffusion mask between chosen places of [x_t1 ; … ; x_0], each `length` long.

    A noised place sees its own noised block and all earlier clean blocks, a clean one the clean
    blocks up to its own. The last block may be shorter than `block`; `draws`: how many x_t there
    are. Places count on through examples, of which none sees another. Place −1 is padding: seen by
    none; it sees itself, so that no row is empty.
    """
    blocks, copies = block_labels(places, length, block, draws)
    return sees(blocks[:, :, None], blocks[:, None], copies[:, :, None], copies[:, None])[:, None]


_CLEAN = 0xFFFF  # the copy x_0; of all copies the largest
# Whether q sees k: in its own block of its own copy, or of its example's x_0 in an earlier block.
# A lambda: tests wrap every `def` in checks of its types, which the compiler cannot read.
sees = lambda q_block, k_block, q_copy, k_copy: (  # noqa: E731
    (q_copy == k_copy) & (q_block == k_block) | (q_copy | _CLEAN == k_copy) & (q_block > k_block)
)


def block_labels(
    places: Int[Tensor, "batch rows"], length: int, block: int, draws: int
) -> tuple[Int[Tensor, "batch rows"], Int[Tensor, "batch rows"]]:
    """What `sees` compares, in int32: of each place its block, and its example and copy in one
    number. Every padded place has a copy of its own, and no x_0.
    """
    copies = places // length
    examples, copies = copies // (draws + 1), copies % (draws + 1)
    copies = (examples << 16) + copies.masked_fill(copies == draws, _CLEAN)
    nothing = -2 * torch.arange(1, places.shape[1] + 1, device=places.device)
    copies = torch.where(places < 0, nothing, copies)
    return (places % length // block).int(), copies.int()
