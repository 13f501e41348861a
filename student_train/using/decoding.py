"""Rows under way, block by block: what of them is in the cache, and one block from masks to tokens.

Rows may join between blocks (a server's requests). Each has settings of its own; the block and the
guidance are those of all. Blocks are counted from position 0, as in training and in the engines
that serve block diffusion: what is left of a prompt behind its last whole block stands, clean, in
the first block of the response. Slots of the cache are common to all rows, positions are a row's
own: whole blocks of padding on the left move its slots alone, so that it gives what it gives alone.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, TopKLogitsWarper, TopPLogitsWarper

from shared.diffusion import block_causal
from student_train.using.settings import SampleConfig, Special


class Row:
    """One response in the making. ValueError where the prompt is empty."""

    def __init__(self, prompt: Sequence[int], config: SampleConfig) -> None:
        if not prompt:
            raise ValueError("a prompt is empty; each needs at least one token")
        self.prompt = prompt
        self.config = config
        self.made: list[int] = []  # its finished blocks, cut at the limit; from its end on EOS
        self.state: list[int] = []  # the same after each step, the block at hand included
        self.sure: list[float] = []  # how sure it was of that block's tokens as each became final
        self.tail: Sequence[int] = []  # what of the prompt stands in the block that comes next
        # Noise depends on the seed and the prompt, not on the batch.
        digest = hashlib.blake2b(f"{config.seed}:{list(prompt)}".encode(), digest_size=7).digest()
        self.noise = torch.Generator().manual_seed(int.from_bytes(digest))

    def settles(self, size: int, step: int) -> tuple[float, float]:
        """How many of a block become final in this step, and above which confidence all do."""
        if self.config.threshold is not None:
            return 1, self.config.threshold
        count, more = divmod(size, min(size, self.config.steps_per_block or size))
        return count + (step < more), torch.inf  # one more in the first steps


class Decoding:
    """Prompts and finished blocks of `rows` in the cache, and what is not in it yet. With guidance
    every row is there twice: the second half of the batch has its prompts masked.
    """

    def __init__(self, model: Any, special: Special, block: int, guidance: float = 0.0) -> None:
        self._model, self._special, self._block, self._guidance = model, special, block, guidance
        self._copies = 2 if guidance > 0 else 1
        self._device = model.get_input_embeddings().weight.device
        self._ends = torch.tensor([special.eos, *special.ends], device=self._device)
        self.passes = 0  # of the model, so far
        self._begin([])

    def _begin(self, rows: Sequence[Row]) -> None:
        """Nothing but the whole blocks of the prompts of `rows`, none of them encoded."""
        self.rows = list(rows)
        starts = [len(row.prompt) // self._block * self._block for row in rows]
        for row, start in zip(self.rows, starts, strict=True):
            row.tail = row.prompt[start:]
        whole = [row.prompt[:start] for row, start in zip(self.rows, starts, strict=True)]
        ids, valid = pad_left(whole, self._block, self._special.pad)
        if self._guidance > 0:
            ids = torch.cat([ids, torch.where(valid, self._special.mask, ids)])
            valid = valid.repeat(2, 1)
        self._pending = ids.to(self._device)  # [copies · rows, n], behind the cached slots
        self._valid = valid.to(self._device)  # [copies · rows, slots], False at padding
        self._offset = (~self._valid).sum(dim=1)  # slots before a row's position 0
        self._cache = DynamicCache()
        self._cached = 0  # slots

    @torch.no_grad()
    def join(self, rows: Sequence[Row]) -> None:
        """Decode these too, from the next block on. Where others are under way, the whole blocks of
        their prompts but the last are encoded now; that goes with their first new block.
        """
        if not self.rows:
            self._begin(rows)
            return
        # 1. Both sides: all that is pending into the cache, but for its last block.
        others = Decoding(self._model, self._special, self._block, self._guidance)
        others._begin(rows)
        for side in (self, others):
            ahead = side._pending.shape[1] - self._block
            if ahead > 0:
                side._run(side._pending[:, :ahead])
                side._cached += ahead
                side._pending = side._pending[:, ahead:]
        # 2. Equally many slots: whole blocks of padding on the left of the shorter side.
        width, like = max(self._cached, others._cached), self if self._cached else others
        layers, their_layers = self._widened(width, like), others._widened(width, like)
        # 3. One batch: all rows, then their masked copies.
        mine, theirs = len(self.rows), len(others.rows)

        def together(a: Tensor, b: Tensor) -> Tensor:
            return torch.cat([a[:mine], b[:theirs], a[mine:], b[theirs:]])

        self._valid = together(self._valid, others._valid)
        self._offset = together(self._offset, others._offset)
        self._pending = together(self._pending, others._pending)
        both = zip(layers, their_layers, strict=True)
        self._cache = DynamicCache((together(k, k2), together(v, v2)) for (k, v), (k2, v2) in both)
        self._cached = width
        self.rows = self.rows + others.rows
        self.passes += others.passes

    def _widened(self, width: int, like: "Decoding") -> list[tuple[Tensor, Tensor]]:
        """Padding on the left, up to `width` slots; of each layer keys and values so widened,
        [copies · rows, heads, width, size], in the form of `like` where nothing is cached.
        """
        layers: Any = (self if self._cached else like)._cache.layers
        wide = []
        for layer in layers:
            keys, values = layer.keys, layer.values
            if not self._cached:
                rows = len(self._pending)
                keys = keys[:1, :, :0].expand(rows, -1, -1, -1)
                values = values[:1, :, :0].expand(rows, -1, -1, -1)
            more = (0, 0, width - keys.shape[2], 0)
            wide.append((pad(keys, more), pad(values, more)))
        self._valid = pad(self._valid, (width - self._cached, 0))
        self._offset = self._offset + width - self._cached
        return wide

    def keep(self, going: Sequence[bool]) -> None:
        """The other rows leave, and padding that no row needs any more."""
        if all(going):
            return
        kept = [i for i, goes in enumerate(going) if goes]
        self.rows = [self.rows[i] for i in kept]
        if not self.rows:
            self._begin([])
            return
        both = [row + copy * len(going) for copy in range(self._copies) for row in kept]
        cut = min(int(self._offset[both].min()), self._cached)
        self._pending = self._pending[both]
        self._valid = self._valid[both, cut:]
        self._offset = self._offset[both] - cut
        layers: Any = self._cache.layers
        self._cache = DynamicCache((x.keys[both, :, cut:], x.values[both, :, cut:]) for x in layers)
        self._cached -= cut

    @torch.no_grad()
    def next_block(self) -> Iterator[None]:
        """Settle one block, or what of it lies within the limits. After each step, and at last with
        EOS from an end on, it stands in the rows' `state`, and is then `made`.
        """
        size, eos = self._block, self._special.eos
        block = torch.full((len(self.rows), size), self._special.mask, device=self._device)
        for i, row in enumerate(self.rows):
            block[i, : len(row.tail)] = torch.tensor(list(row.tail), dtype=torch.long)
        tails = torch.tensor([len(row.tail) for row in self.rows], device=self._device)
        column = torch.arange(size, device=self._device)
        new = column >= tails[:, None]
        left = [row.config.new_tokens - len(row.made) for row in self.rows]
        wanted = column < (tails + torch.tensor(left, device=self._device))[:, None]
        masked, step, sure = new, 0, torch.zeros(block.shape, device=self._device)
        while bool((masked & wanted).any()):
            # 1. Hidden states of the block. What is pending goes through with it and stays in the
            #    cache; the noised block does not.
            both = torch.cat([self._pending, self._copied(block, new)], dim=1)
            hidden = self._run(both)[:, -size:]
            self._cache.crop(-size)
            self._cached += self._pending.shape[1]
            self._pending = self._pending[:, :0]
            # 2. A token for every masked position, and how sure the row is of it.
            tokens, confidence = self._choose(hidden, masked)
            # 3. The most confident ones are final: a number of them, and all above a threshold.
            confidence = torch.where(masked, confidence, -torch.inf)
            rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            rules = torch.tensor([row.settles(size, step) for row in self.rows])
            count, above = rules.to(confidence).unbind(dim=1)
            final = masked & ((rank < count[:, None]) | (confidence > above[:, None]))
            block, sure = torch.where(final, tokens, block), torch.where(final, confidence, sure)
            masked, step = masked & ~final, step + 1
            self._note(block, sure)
            yield
        # 4. Behind an end there is nothing but EOS.
        ended = (torch.isin(block, self._ends) & new).cumsum(dim=1) > 0
        block = torch.where(ended, eos, block)
        self._pending = self._copied(block, new)
        self._note(block, sure)
        for row in self.rows:
            row.made, row.tail = row.state, []
        yield

    def _note(self, block: Int[Tensor, "rows size"], sure: Float[Tensor, "rows size"]) -> None:
        """What of the block is response, and within the limit, into the rows' `state`."""
        for row, ids, how_sure in zip(self.rows, block.tolist(), sure.tolist(), strict=True):
            row.state = (row.made + ids[len(row.tail) :])[: row.config.new_tokens]
            row.sure = how_sure[len(row.tail) :]

    def _copied(
        self, block: Int[Tensor, "rows size"], new: Bool[Tensor, "rows size"]
    ) -> Int[Tensor, "batch size"]:
        """The rows, and with guidance their copies, in which what is not `new` is masked."""
        if self._copies == 1:
            return block
        return torch.cat([block, torch.where(new, block, self._special.mask)])

    def _run(self, ids: Int[Tensor, "batch n"]) -> Float[Tensor, "batch n width"]:
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

    def _choose(
        self, hidden: Float[Tensor, "batch block width"], masked: Bool[Tensor, "rows block"]
    ) -> tuple[Int[Tensor, "rows block"], Float[Tensor, "rows block"]]:
        """A token for each masked position, and its probability (or a random number)."""
        special = self._special
        # 1. Logits of the masked positions alone, row after row: [n, vocab]. The head runs on
        #    whole multiples of 32 positions: products of a few round otherwise than those of many,
        #    and a prompt alone must give what it gives in a batch.
        parts = []
        for copy in hidden.split(len(masked)):
            states = copy[masked]
            padded = pad(states, (0, 0, 0, -len(states) % 32))
            parts.append(self._model.lm_head(padded)[: len(states)].float())
        logits = parts[0]
        if self._guidance > 0:  # away from what a masked prompt gives
            logits = parts[1] + (1 + self._guidance) * (logits - parts[1])
        # 2. No mask token, no id without a token, no end that comes too early.
        logits[:, special.mask] = -torch.inf
        if special.vocabulary is not None:
            logits[:, special.vocabulary :] = -torch.inf
        behind = [row.config.min_new_tokens - len(row.made) for row in self.rows]
        early = torch.tensor([n + len(row.tail) for n, row in zip(behind, self.rows, strict=True)])
        if bool((early > 0).any()):
            row_of, column = masked.nonzero().unbind(dim=1)
            too_early = (column < early.to(column.device)[row_of])[:, None]
            logits[:, self._ends] = logits[:, self._ends].masked_fill(too_early, -torch.inf)
        # 3. The likeliest token; with a temperature, of logits over it, inside top_k and top_p,
        #    with Gumbel noise: that samples from their softmax.
        by_row = list(logits.split(masked.sum(dim=1).tolist()))
        shape, unread_ids = (masked.shape[1], logits.shape[1]), cast(Any, None)
        for i, row in enumerate(self.rows):
            config = row.config
            # Colder than 1e-5 is greedy. A row that is done draws no noise.
            if config.temperature > 1e-5 and len(by_row[i]):
                warm: Any = by_row[i] / config.temperature
                if (config.top_k or 0) > 0:
                    warm = TopKLogitsWarper(config.top_k)(unread_ids, warm)
                if config.top_p < 1:
                    warm = TopPLogitsWarper(config.top_p)(unread_ids, warm)
                # In float64 log(−log u) keeps its tail.
                uniform = torch.rand(shape, generator=row.noise, dtype=torch.float64)
                noise = -torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-12))).float()
                by_row[i] = warm + noise[masked[i].cpu()].to(warm.device)
        chosen = torch.cat(by_row).argmax(dim=1)
        # 4. Back in their places, with the confidence by which they settle.
        tokens = torch.full(masked.shape, special.mask, device=logits.device)
        tokens = tokens.masked_scatter(masked, chosen)
        confidence = torch.zeros(masked.shape, device=logits.device)
        random = [row.config.remasking == "random" for row in self.rows]
        if not all(random):  # random numbers need no probabilities
            probability = logits.softmax(dim=1).gather(1, chosen[:, None])[:, 0]
            confidence = confidence.masked_scatter(masked, probability)
        for i, row in enumerate(self.rows):
            if random[i] and len(by_row[i]):
                numbers = torch.rand(masked.shape[1], generator=row.noise)
                confidence[i] = numbers.to(confidence.device)
        return tokens, confidence


def pad_left(prompts: Sequence[Sequence[int]], block: int, padding: int) -> tuple[Tensor, Tensor]:
    """Prompts, padded on the left to one whole block or more, [rows, width]; True at tokens."""
    width = max(1, -(-max(map(len, prompts), default=0) // block)) * block
    ids = torch.full((len(prompts), width), padding)
    valid = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.long)
        valid[row, width - len(prompt) :] = True
    return ids, valid
