"""Rows under way, block by block: what of them is in the cache, and one block's steps from masks to tokens.

Rows may join between blocks (a server's requests come when they come). Each has settings of its own; the block and the
guidance are those of all. Slots of the cache are common to all rows, positions are a row's own: whole blocks of padding
on the left move a row's slots and nothing else, so that a row gives what it gives alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, TopKLogitsWarper, TopPLogitsWarper

from shared.diffusion.attention import block_causal
from student_train.using.settings import SampleConfig, Special


class Row:
    """One response in the making. ValueError where the prompt is empty."""

    def __init__(self, prompt: Sequence[int], config: SampleConfig) -> None:
        if not prompt:
            raise ValueError("a prompt is empty; each needs at least one token")
        self.prompt, self.config = prompt, config
        self.made: list[int] = []
        """Tokens of its finished blocks; from its end on they are EOS."""
        # Noise depends on the seed and the prompt, not on the batch.
        digest = hashlib.blake2b(f"{config.seed}:{list(prompt)}".encode(), digest_size=7).digest()
        self.noise = torch.Generator().manual_seed(int.from_bytes(digest))


class Decoding:
    """Prompts and finished blocks of `rows` in the cache, and what is not in it yet."""

    def __init__(self, model: Any, special: Special, block: int, guidance: float = 0.0) -> None:
        self._model, self._special, self._block, self._guidance = model, special, block, guidance
        self._copies = 2 if guidance > 0 else 1
        self._device = model.get_input_embeddings().weight.device
        self._ends = torch.tensor([special.eos, *special.ends], device=self._device)
        self.rows: list[Row] = []
        self.passes = 0
        """Of the model, so far."""
        self._begin([])

    @torch.no_grad()
    def join(self, rows: Sequence[Row]) -> None:
        """Decode these too, from the next block on. Where others are under way, all of their prompts but the last block
        is encoded now; that goes through the model with their first new block, as the others' last block does.
        """
        if not self.rows:
            self._begin(rows)
            return
        others = Decoding(self._model, self._special, self._block, self._guidance)
        others._begin(rows)
        for each in (self, others):
            each._encode_ahead()
        self._take(others)

    @torch.no_grad()
    def next_block(self, size: int) -> Iterator[Int[Tensor, "rows size"]]:
        """Settle one block of `size` positions: its state after each step, and the whole with EOS from an end on."""
        mask = self._special.mask
        block = torch.full((len(self.rows), size), mask, device=self._device)
        step = 0
        while bool((masked := block == mask).any()):
            tokens, confidence = self._choose(self._hidden(block), masked)
            settled = self._settle(confidence, masked, step)
            block = torch.where(settled, tokens, block)
            step += 1
            yield block
        ends = torch.isin(block, self._ends)
        block = torch.where(ends.cumsum(dim=1) > 0, self._special.eos, block)
        self._pending = block.repeat(self._copies, 1)
        for row, tokens in zip(self.rows, block.tolist(), strict=True):
            row.made += tokens
        yield block

    def keep(self, going: Sequence[bool]) -> None:
        """The other rows leave, and cost nothing from here on; nor does padding that no row needs any more."""
        if all(going):
            return
        kept = [i for i, goes in enumerate(going) if goes]
        self.rows = [self.rows[i] for i in kept]
        if not self.rows:
            self._begin([])
            return
        both = [row + half * len(going) for half in range(self._copies) for row in kept]
        self._pending, self._valid, self._offset = (
            self._pending[both],
            self._valid[both],
            self._offset[both],
        )
        cut = min(int(self._offset.min()), self._cached)
        self._valid, self._offset, self._cached = (
            self._valid[:, cut:],
            self._offset - cut,
            self._cached - cut,
        )
        self._cache = _cache_of(
            (keys[both, :, cut:], values[both, :, cut:]) for keys, values in self._layers()
        )

    def _begin(self, rows: Sequence[Row]) -> None:
        """Nothing but the prompts of `rows`, none of them encoded."""
        self.rows = list(rows)
        ids, valid = pad_left([row.prompt for row in rows], self._block, self._special.pad)
        if self._guidance > 0:  # the second half of the batch has its prompt masked
            ids, valid = (
                torch.cat([ids, torch.where(valid, self._special.mask, ids)]),
                valid.repeat(2, 1),
            )
        padding = (~valid).sum(dim=1) // self._block * self._block
        self._pending, self._valid = ids.to(self._device), valid.to(self._device)
        self._offset = padding.to(self._device)  # slots before a row's position 0
        self._cache, self._cached = DynamicCache(), 0

    def _encode_ahead(self) -> None:
        """Bring all that is pending into the cache, but for its last block."""
        ahead = self._pending.shape[1] - self._block
        if ahead > 0:
            self._run(self._pending[:, :ahead])
            self._cached, self._pending = self._cached + ahead, self._pending[:, ahead:]

    def _take(self, others: Decoding) -> None:
        """Take over rows of which, as of these, one block is pending. The shorter get padding on the left."""
        mine, theirs, width = len(self.rows), len(others.rows), max(self._cached, others._cached)

        def together(a: Tensor, b: Tensor) -> Tensor:
            """Rows, and after all of them their guides."""
            return torch.cat([a[:mine], b[:theirs], a[mine:], b[theirs:]])

        for part in (self, others):
            more = width - part._cached
            part._valid, part._offset = pad(part._valid, (more, 0)), part._offset + more
        self._valid, self._offset = (
            together(self._valid, others._valid),
            together(self._offset, others._offset),
        )
        layers = zip(self._widened(width, others), others._widened(width, self), strict=True)
        self._cache = _cache_of(
            (together(k, others_k), together(v, others_v))
            for (k, v), (others_k, others_v) in layers
        )
        self._pending = together(self._pending, others._pending)
        self.rows, self._cached, self.passes = (
            self.rows + others.rows,
            width,
            self.passes + others.passes,
        )

    def _layers(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of each layer."""
        layers: Any = self._cache.layers
        for layer in layers:
            yield layer.keys, layer.values

    def _widened(self, width: int, like: Decoding) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of each layer in `width` slots; of `like` where nothing is cached here yet, without slots."""
        for pair in (self if self._cached else like)._layers():
            own = (
                pair
                if self._cached
                else [part[:1, :, :0].expand(len(self._pending), -1, -1, -1) for part in pair]
            )
            keys, values = (pad(part, (0, 0, width - part.shape[2], 0)) for part in own)
            yield keys, values

    def _run(self, ids: Int[Tensor, "rows n"]) -> Float[Tensor, "rows n width"]:
        """Hidden states of what follows the cached slots; its keys and values stay in the cache."""
        known = self._cached + ids.shape[1]
        if self._valid.shape[1] < known:
            self._valid = pad(self._valid, (0, known - self._valid.shape[1]), value=True)
        mask = block_causal(self._valid[:, :known], self._block)[:, :, self._cached :]
        slots = torch.arange(self._cached, known, device=self._device)
        output = self._model.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(slots - self._offset[:, None]).clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
        )
        self.passes += 1
        return output.last_hidden_state

    def _hidden(self, block: Int[Tensor, "batch block"]) -> Float[Tensor, "rows block width"]:
        """Hidden states of the block at hand. What is pending goes through with it and stays in the cache."""
        size = block.shape[1]
        hidden = self._run(torch.cat([self._pending, block.repeat(self._copies, 1)], dim=1))
        self._cache.crop(-size)  # the noised block does not stay
        self._cached, self._pending = self._cached + self._pending.shape[1], self._pending[:, :0]
        return hidden[:, -size:]

    def _logits(
        self, hidden: Float[Tensor, "rows block width"], masked: Bool[Tensor, "batch block"]
    ) -> Float[Tensor, "n vocab"]:
        """Logits of the masked positions alone, one after the other; no mask token, no EOS that comes too early."""
        parts = [self._head(part[masked]) for part in hidden.split(len(masked))]
        logits = parts[0]
        if self._guidance > 0:  # away from what a masked prompt gives
            logits = parts[1] + (1 + self._guidance) * (logits - parts[1])
        logits[:, self._special.mask] = -torch.inf
        if self._special.vocabulary is not None:
            logits[:, self._special.vocabulary :] = -torch.inf
        early = torch.tensor([row.config.min_new_tokens - len(row.made) for row in self.rows])
        if bool((early > 0).any()):
            row, column = masked.nonzero().unbind(dim=1)
            too_early = column < early.to(column.device)[row]
            logits[:, self._ends] = logits[:, self._ends].masked_fill(
                too_early[:, None], -torch.inf
            )
        return logits

    def _head(self, rows: Float[Tensor, "n width"]) -> Float[Tensor, "n vocab"]:
        """The LM head on whole multiples of 32 rows: products of a few rows round otherwise than those of many, and a
        prompt alone must give what it gives in a batch.
        """
        padded = pad(rows, (0, 0, 0, -len(rows) % 32))
        return self._model.lm_head(padded)[: len(rows)].float()

    def _choose(
        self, hidden: Float[Tensor, "rows block width"], masked: Bool[Tensor, "batch block"]
    ) -> tuple[Int[Tensor, "batch block"], Float[Tensor, "batch block"]]:
        """A token for each masked position, and its probability (or a random number); elsewhere nothing of use."""
        logits = self._logits(hidden, masked)
        chosen = self._warmed(logits, masked).argmax(dim=1)
        tokens = torch.full(masked.shape, self._special.mask, device=logits.device).masked_scatter(
            masked, chosen
        )
        confidence = torch.zeros(masked.shape, device=logits.device)
        random = [row.config.remasking == "random" for row in self.rows]
        if not all(random):  # random numbers need no probabilities
            probability = logits.softmax(dim=1).gather(1, chosen[:, None])[:, 0]
            confidence = confidence.masked_scatter(masked, probability)
        for i in (i for i, drawn in enumerate(random) if drawn):
            confidence[i] = torch.rand(masked.shape[1], generator=self.rows[i].noise).to(
                confidence.device
            )
        return tokens, confidence

    def _warmed(
        self, logits: Float[Tensor, "n vocab"], masked: Bool[Tensor, "batch block"]
    ) -> Float[Tensor, "n vocab"]:
        """Logits over temperature, inside top_k and top_p, with Gumbel noise, in rows that have a temperature; as they
        are in greedy rows.
        """
        if not any(row.config.temperature > 0 for row in self.rows):
            return logits
        parts = []
        shape = torch.Size((masked.shape[1], logits.shape[1]))
        counts = masked.sum(dim=1).tolist()
        for row, own, where in zip(self.rows, logits.split(counts), masked, strict=True):
            if row.config.temperature > 0:
                noise = _gumbel(shape, row.noise)[where.cpu()].to(own.device)
                parts.append(_narrowed(own / row.config.temperature, row.config) + noise)
            else:
                parts.append(own)
        return torch.cat(parts)

    def _settle(
        self,
        confidence: Float[Tensor, "batch block"],
        masked: Bool[Tensor, "batch block"],
        step: int,
    ) -> Bool[Tensor, "batch block"]:
        """Which masked positions are final after this step: the most confident ones."""
        confidence = torch.where(masked, confidence, -torch.inf)
        rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        rules = [_rule(row.config, masked.shape[1], step) for row in self.rows]
        count, above = torch.tensor(rules, device=masked.device, dtype=confidence.dtype).unbind(
            dim=1
        )
        return masked & ((rank < count[:, None]) | (confidence > above[:, None]))


def _rule(config: SampleConfig, size: int, step: int) -> tuple[float, float]:
    """How many of a block of `size` settle in this step at least, and above which confidence all do."""
    if config.threshold is not None:
        return 1, config.threshold
    count, more = divmod(size, min(size, config.steps_per_block or size))
    return count + (step < more), torch.inf


def _narrowed(logits: Float[Tensor, "n vocab"], config: SampleConfig) -> Float[Tensor, "n vocab"]:
    """−∞ outside of top_k and top_p, by transformers' filters (which read no ids)."""
    unread: Any = None
    kept: Any = logits
    if config.top_k is not None:
        kept = TopKLogitsWarper(config.top_k)(unread, kept)
    return TopPLogitsWarper(config.top_p)(unread, kept) if config.top_p < 1 else kept


def _cache_of(layers: Iterable[tuple[Tensor, Tensor]]) -> DynamicCache:
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache


def pad_left(prompts: Sequence[Sequence[int]], block: int, padding: int) -> tuple[Tensor, Tensor]:
    """Prompts, padded on the left to whole blocks; True where a token is."""
    width = -(-max(map(len, prompts), default=0) // block) * block
    ids = torch.full((len(prompts), width), padding)
    valid = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        valid[row, width - len(prompt) :] = True
    return ids, valid


def _gumbel(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise; computed in float64, where log(−log u) keeps its tail."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return -torch.log(-torch.log(uniform)).float()
