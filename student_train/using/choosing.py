"""Responses in the making, and how their tokens are chosen.

Random numbers are hashes of counters (SplitMix64) in 64-bit integers: a function of their key, the
same on a CPU and a GPU and in every batch.
"""

import hashlib
import itertools
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import TopKLogitsWarper, TopPLogitsWarper

from student_train.using.settings import SampleConfig

_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # signed
_CHUNK = 256  # tokens


class Row:
    """One response in the making. ValueError where the prompt is empty."""

    def __init__(self, prompt: Sequence[int], config: SampleConfig) -> None:
        if not prompt:
            raise ValueError("a prompt is empty; each needs at least one token")
        self.prompt = prompt
        self.config = config
        self.made: list[int] = []  # its finished blocks, cut at the limit; from its end on EOS
        self.state: list[int] = []  # the same after each step, the block at hand included
        self.sure = torch.zeros(0)  # how sure it was of that block's tokens as each became final
        self.masked = 0  # how many positions of the block at hand are
        self.tail: Sequence[int] = []  # what of the prompt stands in the block that comes next
        # Noise depends on the seed and the prompt, not on the batch.
        digest = hashlib.blake2b(f"{config.seed}:{list(prompt)}".encode(), digest_size=7).digest()
        self.key = int.from_bytes(digest)

    def rules(self, size: int) -> list[int]:
        """Of the next block: how many tokens are there, before which column no end may come, how
        many settle in each step, in how many first steps one more, if at random, and its noise.
        """
        config, there = self.config, len(self.tail)
        steps = size if config.threshold is not None else config.steps_per_block or size
        count, more = divmod(size, min(size, steps))
        early = config.min_new_tokens - len(self.made) + there
        key = self.key + len(self.prompt) + len(self.made) - there
        return [there, early, count, more, config.remasking == "random", key]


def hashed(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """SplitMix64's bijection of 64 bits, by which neighbours become unrelated."""
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # the shift brings in zeros
    return x


def uniform(keys: Int[Tensor, " n"], count: int) -> Float[Tensor, "n count"]:
    """Of each key so many numbers strictly between 0 and 1, fine near 0: as small as 2⁻⁶⁴."""
    bits = hashed(keys[:, None] + torch.arange(1, count + 1, device=keys.device) * _STEP)
    return ((bits & (2**63 - 1)).float() * 2.0**-63).clamp(2.0**-64, 1 - 2.0**-24)


def drawn(logits: Float[Tensor, "n vocab"], keys: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """A token from the softmax of each row: a chunk of the vocabulary, by what its tokens weigh
    together, then one of these. Each is the largest logit with Gumbel noise, of which few are made.
    """
    wide = pad(logits, (0, -logits.shape[1] % _CHUNK), value=-torch.inf).unflatten(1, (-1, _CHUNK))
    weights = wide.logsumexp(dim=2)
    noise = -torch.log(-torch.log1p(-uniform(keys, weights.shape[1] + _CHUNK)))
    chunk = (weights + noise[:, _CHUNK:]).argmax(dim=1)
    inside = wide.take_along_dim(chunk[:, None, None], dim=1)[:, 0]
    return chunk * _CHUNK + (inside + noise[:, :_CHUNK]).argmax(dim=1)


def choose(
    logits: Float[Tensor, "n vocab"], rows: Sequence[Row], keys: Int[Tensor, " n"]
) -> Int[Tensor, " n"]:
    """Of each row's masked positions, row after row, the likeliest token; with a temperature, one
    drawn from the softmax of logits over it, inside top_k and top_p.
    """
    chosen, start, unread_ids = [], 0, cast(Any, None)
    how = attrgetter("config.temperature", "config.top_k", "config.top_p")
    for (warmth, top_k, top_p), alike in itertools.groupby(rows, how):
        end = start + sum(row.masked for row in alike)
        warm: Any = logits[start:end]
        if warmth <= 1e-5:  # logits over less would overflow
            chosen.append(warm.argmax(dim=1))
        elif start < end:
            warm = warm / warmth
            warm = TopKLogitsWarper(top_k)(unread_ids, warm) if (top_k or 0) > 0 else warm
            warm = TopPLogitsWarper(top_p)(unread_ids, warm) if top_p < 1 else warm
            chosen.append(drawn(warm, keys[start:end]))
        start = end
    return torch.cat(chosen)
