"""Log-likelihood of continuations, bounded from below by the diffusion ELBO of block diffusion (LLaDA, BD3LM).

For a block of n tokens the bound is E over l uniform in 1 … n, and over sets S of l masked positions, of
(n / l) · Σ_{i in S} log p(x_i | rest of the block, earlier blocks): the mean, over all orders in which the block's
tokens can be revealed, of the log-probability of revealing them in that order. Blocks add up, and a block of one
token is exact. As in sampling, the continuation starts a block, and the part of the last block behind it is masked.

The sets are fixed: they depend on the seed, the block and the draw, not on the text. Answers to one question are
thus compared under the same noise, and a score does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from student_train.using.decoding import pad_left
from student_train.using.settings import Special

_TOKENS_PER_PASS = 2048
"""Of noised copies; they do not see each other, so more at once would mostly add masked attention."""
_LOGITS_PER_SLICE = 1 << 26


@dataclass(frozen=True)
class ElboConfig:
    """`draws` masks for each block (more lower the variance), `block` as in training, `seed` of the masks."""

    draws: int = 32
    block: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.draws < 1 or self.block < 1:
            raise ValueError(f"draws is {self.draws}, block {self.block}; both must be positive")


@dataclass(frozen=True)
class _Copy:
    """One noised copy of a block: of which continuation, which block of it, what is masked and scored."""

    owner: int
    index: int
    tokens: list[int]
    scored: list[int]
    weight: float


def log_likelihoods(
    model: Any, context: Sequence[int], continuations: Sequence[Sequence[int]], special: Special, config: ElboConfig
) -> list[float]:
    """Lower bounds of log p(continuation | context), in nats, one for each; the context is encoded once for all.

    ValueError where the context or a continuation is empty.
    """
    if not context or not all(continuations):
        raise ValueError("the context or a continuation is empty; each needs at least one token")
    copies = [copy for i, tokens in enumerate(continuations) for copy in _copies(i, tokens, special.mask, config)]
    scores = torch.zeros(len(continuations), dtype=torch.float64)
    with torch.no_grad():
        state = _Clean(model, context, continuations, special, config.block)
        per_pass = max(1, _TOKENS_PER_PASS // config.block)
        for start in range(0, len(copies), per_pass):
            part = copies[start : start + per_pass]
            owners = torch.tensor([copy.owner for copy in part])
            scores.index_add_(0, owners, state.score(part, continuations).double().cpu())
    return scores.tolist()


def masks(length: int, index: int, config: ElboConfig) -> list[tuple[Bool[Tensor, " length"], float]]:
    """Masked sets of block `index`, which has `length` tokens, and the weight of each: n / (l · draws).

    l is stratified over the draws, each of 1 … length equally likely over seeds. One token needs one mask.
    """
    if length == 1:
        return [(torch.ones(1, dtype=torch.bool), 1.0)]
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
    shift = float(torch.rand(1, generator=generator, dtype=torch.float64))
    order = torch.rand(config.draws, config.block, generator=generator).argsort(dim=1)
    found = []
    for draw in range(config.draws):
        count = 1 + min(length - 1, int(length * (draw + shift) / config.draws))
        mask = torch.zeros(length, dtype=torch.bool)
        mask[order[draw][order[draw] < length][:count]] = True
        found.append((mask, length / count / config.draws))
    return found


def _copies(owner: int, tokens: Sequence[int], mask_id: int, config: ElboConfig) -> list[_Copy]:
    copies = []
    for start in range(0, len(tokens), config.block):
        block = torch.tensor(tokens[start : start + config.block])
        for mask, weight in masks(len(block), start // config.block, config):
            noised = block.masked_fill(mask, mask_id).tolist() + [mask_id] * (config.block - len(block))
            copies.append(_Copy(owner, start // config.block, noised, mask.nonzero()[:, 0].tolist(), weight))
    return copies


class _Clean:
    """Context and clean blocks of all continuations in the key-value cache; noised copies are run against it."""

    def __init__(
        self,
        model: Any,
        context: Sequence[int],
        continuations: Sequence[Sequence[int]],
        special: Special,
        block: int,
    ) -> None:
        self._model, self._block = model, block
        self._device = model.get_input_embeddings().weight.device
        padded, valid = pad_left([context], block, special.pad)
        self._start = padded.shape[1]
        shared = [-1] * self._start
        rows = [(i, [*tokens[: (len(tokens) - 1) // block * block]]) for i, tokens in enumerate(continuations)]
        ids = padded[0].tolist() + [token for _, tokens in rows for token in tokens]
        self._owner = torch.tensor(shared + [i for i, tokens in rows for _ in tokens])
        own = [self._start + at for _, tokens in rows for at in range(len(tokens))]
        self._position = torch.tensor(list(range(self._start)) + own)
        self._seen = torch.cat([valid[0], torch.ones(len(own), dtype=torch.bool)])
        self._cache = DynamicCache()
        self._run(torch.tensor(ids), self._position, self._mask(self._owner, self._position, own_block=True))

    def _mask(
        self, owner: Int[Tensor, " query"], position: Int[Tensor, " query"], own_block: bool
    ) -> Bool[Tensor, "query clean"]:
        """Which clean positions are seen: the context's and one's own, of earlier blocks (and of the same block)."""
        mine = (self._owner[None] == owner[:, None]) | (self._owner[None] < 0)
        query, key = position[:, None] // self._block, self._position[None] // self._block
        return mine & ((key <= query) if own_block else (key < query)) & self._seen[None]

    def _run(
        self, ids: Int[Tensor, " n"], position: Int[Tensor, " n"], mask: Bool[Tensor, "n keys"]
    ) -> Float[Tensor, "n width"]:
        own = torch.arange(len(ids))
        mask[own, mask.shape[1] - len(ids) + own] = True  # padding sees itself, so that no row is empty
        output = self._model.model(
            input_ids=ids[None].to(self._device),
            position_ids=position[None].to(self._device),
            attention_mask=mask[None, None].to(self._device),
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.last_hidden_state[0]

    def score(self, copies: list[_Copy], continuations: Sequence[Sequence[int]]) -> Float[Tensor, " copies"]:
        """Weighted Σ log p(gold) of each copy."""
        block, count = self._block, len(copies)
        ids = torch.tensor([copy.tokens for copy in copies])
        starts = torch.tensor([self._start + copy.index * block for copy in copies])
        position = (starts[:, None] + torch.arange(block)).flatten()
        owner = torch.tensor([copy.owner for copy in copies]).repeat_interleave(block)
        copy_of = torch.arange(count).repeat_interleave(block)
        mask = torch.cat([self._mask(owner, position, own_block=False), copy_of[:, None] == copy_of[None]], dim=1)
        hidden = self._run(ids.flatten(), position, mask)
        self._cache.crop(-count * block)
        rows = [n * block + at for n, copy in enumerate(copies) for at in copy.scored]
        gold = [continuations[copy.owner][copy.index * block + at] for copy in copies for at in copy.scored]
        logp = self._log_probability(hidden[torch.tensor(rows, device=hidden.device)], torch.tensor(gold))
        weights = torch.tensor([copy.weight for copy in copies for _ in copy.scored])
        of = torch.tensor([n for n, copy in enumerate(copies) for _ in copy.scored])
        return torch.zeros(count).index_add_(0, of, logp.cpu() * weights)

    def _log_probability(self, hidden: Float[Tensor, "n width"], gold: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """log p of the gold tokens, in slices: the mask token counts as any other, as in training."""
        size = max(32, _LOGITS_PER_SLICE // self._model.lm_head.weight.shape[0])
        found = []
        for rows, ids in zip(hidden.split(size), gold.to(hidden.device).split(size), strict=True):
            logits = self._model.lm_head(rows).float()
            found.append(logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(dim=1))
        return torch.cat(found)
