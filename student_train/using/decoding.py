"""Rows under way, block by block: what of them is in the cache, and one block from masks to tokens.

Rows may join between blocks (a server's requests). Each has settings of its own; the block and the
guidance are those of all. Blocks are counted from position 0, as in training and in the engines
that serve block diffusion: what is left of a prompt behind its last whole block stands, clean, in
the first block of the response. Slots of the cache are common to all rows, positions are a row's
own: whole blocks of padding on the left move its slots alone, so that it gives what it gives alone.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from shared.diffusion import block_causal
from student_train.using.choosing import Row, choose, hashed, uniform
from student_train.using.settings import Ids, SampleConfig, Special


class Decoding:
    """Prompts and finished blocks of `rows` in the cache, and what is not in it yet. With guidance
    every row is there twice: the second half of the batch has its prompts masked. Of `config` it
    reads what all rows share.
    """

    def __init__(self, model: Any, special: Special, config: SampleConfig) -> None:
        self._model, self._special, self._config = model, special, config
        self._block, self._guidance = config.block, config.guidance
        self._copies = 2 if config.guidance > 0 else 1
        self._device = model.get_input_embeddings().weight.device
        # Each shape is a CUDA graph: `_fit` has few of them.
        self._short = model.model
        if config.compile:
            self._short = torch.compile(self._short, dynamic=True, mode="reduce-overhead")
        self._ends = torch.tensor([special.eos, *special.ends], device=self._device)
        self.passes = 0  # of the model, so far
        self._begin([])

    def _begin(self, rows: Sequence[Row]) -> None:
        """Nothing but the whole blocks of the prompts of `rows`, none of them encoded."""
        self.rows = list(rows)
        for row in rows:
            row.tail = row.prompt[len(row.prompt) // self._block * self._block :]
        whole = [row.prompt[: len(row.prompt) - len(row.tail)] for row in rows]
        ids, valid = pad_left(whole, self._block, self._special.mask)
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
        others = Decoding(self._model, self._special, self._config)
        others._begin(rows)
        for side in (self, others):
            ahead = side._pending.shape[1] - self._block
            if ahead > 0:
                side._run(side._pending[:, :ahead], ahead)
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

    def _widened(self, width: int, like: "Decoding") -> list[tuple[Tensor, ...]]:
        """Padding on the left, up (or down) to `width` slots; of each layer keys and values so
        padded, [copies · rows, heads, width, size], in the form of `like` where nothing is cached.
        """
        layers: Any = (self if self._cached else like)._cache.layers
        wide = []
        for layer in layers:
            both = [layer.keys, layer.values]
            if not self._cached:
                both = [x[:1, :, :0].expand(len(self._pending), -1, -1, -1) for x in both]
            wide.append(tuple(pad(x, (0, 0, width - self._cached, 0)) for x in both))
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
        left, states = torch.tensor(both, device=self._device), (self._valid, self._offset)
        self._pending, self._valid, self._offset = (x[left] for x in (self._pending, *states))
        layers: list[Any] = self._cache.layers
        for layer in layers:
            layer.keys, layer.values = layer.keys[left], layer.values[left]
        self._fit()

    def _fit(self) -> None:
        """No padding in the cache but what its rows need, up to eight blocks where compiled."""
        slots = self._block * (8 if self._config.compile else 1)
        width = -(-max(self._cached - int(self._offset.min()), 0) // slots) * slots
        self._cache, self._cached = DynamicCache(self._widened(width, self)), width

    @torch.no_grad()
    def next_block(self) -> Iterator[None]:
        """Settle one block, or what of it lies within the limits. After each step, and at last with
        EOS from an end on, it stands in the rows' `state`, and is then `made`.
        """
        # 1. Once a block: what the rows' settings say of it.
        size, mask = self._block, self._special.mask
        rules = torch.tensor([row.rules(size) for row in self.rows], device=self._device)
        there, _, count, more, _, _ = rules[:, :, None].unbind(dim=1)
        sure = [1.0 if row.config.threshold is None else row.config.threshold for row in self.rows]
        above = torch.tensor(sure, device=self._device)[:, None]
        begun = [[*row.tail, *[mask] * (size - len(row.tail))] for row in self.rows]
        block = torch.tensor(begun, device=self._device)
        masked = new = torch.arange(size, device=self._device) >= there
        step, surely = 0, torch.zeros(block.shape, device=self._device)
        self._note(begun, surely)
        while any(mask in row.state for row in self.rows):
            # 2. Hidden states of the block. What is pending goes through with it and stays in the
            #    cache; the noised block does not.
            both = torch.cat([self._pending, self._copied(block, new)], dim=1)
            hidden = self._run(both, self._pending.shape[1])[:, -size:]
            self._pending = self._pending[:, :0]
            # 3. A token for every masked position, and how sure the row is of it.
            tokens, confidence = self._choose(hidden, masked, rules, step)
            # 4. The most confident ones are final: a number of them, and all above a threshold.
            rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            final = masked & ((rank < count + (step < more)) | (confidence > above))
            block = torch.where(final, tokens, block)
            surely = torch.where(final, confidence, surely)
            masked, step = masked & ~final, step + 1
            self._note(block.tolist(), surely)  # the only wait for the device in a step
            yield
        # 5. Behind an end there is nothing but EOS.
        ended = (torch.isin(block, self._ends) & new).cumsum(dim=1) > 0
        block = torch.where(ended, self._special.eos, block)
        self._pending = self._copied(block, new)
        self._note(block.tolist(), surely)
        for row in self.rows:
            row.made, row.tail = row.state, []
        yield

    def _note(self, block: Sequence[list[int]], sure: Float[Tensor, "rows size"]) -> None:
        """What of the block is response, and within the limit, into the rows' `state`."""
        for row, ids, how_sure in zip(self.rows, block, sure, strict=True):
            row.sure = how_sure[len(row.tail) :]
            new = ids[len(row.tail) :]
            row.state, row.masked = row.made + new, new.count(self._special.mask)
            del row.state[row.config.new_tokens :]

    def _copied(
        self, block: Int[Tensor, "rows size"], new: Bool[Tensor, "rows size"]
    ) -> Int[Tensor, "batch size"]:
        """The rows, and with guidance their copies, in which what is not `new` is masked."""
        if self._copies == 1:
            return block
        return torch.cat([block, torch.where(new, block, self._special.mask)])

    def _run(self, ids: Int[Tensor, "batch n"], kept: int) -> Float[Tensor, "batch n width"]:
        """Hidden states of what follows the cached slots; `kept` columns stay in the cache."""
        # All see the cached slots, and block by block what is new.
        cached, width = self._cached, ids.shape[1]
        known = cached + width
        self._valid = pad(self._valid, (0, max(known - self._valid.shape[1], 0)), value=True)
        seen = self._valid[:, None, None, :cached].expand(-1, 1, width, -1)
        within = block_causal(self._valid[:, cached:known], self._block)
        slots = torch.arange(cached, known, device=self._device)
        # A prompt's length is its own: no graph is made for it.
        run = self._short if cached and width <= 2 * self._block else self._model.model
        cache = copy(self._cache)
        cache.layers = [copy(layer) for layer in cache.layers]
        output = run(
            input_ids=ids, attention_mask=torch.cat([seen, within], dim=3), use_cache=True,
            position_ids=(slots - self._offset[:, None]).clamp(min=0), past_key_values=cache,
        )  # fmt: skip
        self.passes += 1
        if kept:
            if kept < width:
                cache.crop(kept - width)
            self._cache, self._cached = cache, cached + kept
            if self._config.compile:
                self._fit()
        return output.last_hidden_state

    def _choose(
        self,
        hidden: Float[Tensor, "batch block width"],
        masked: Bool[Tensor, "rows block"],
        rules: Int[Tensor, "rows rules"],
        step: int,
    ) -> tuple[Int[Tensor, "rows block"], Float[Tensor, "rows block"]]:
        """A token for each masked position, and its probability (or a random number)."""
        special, size = self._special, masked.shape[1]
        # 1. Logits of the masked positions alone, row after row: [n, vocab]. The head runs on
        #    whole multiples of 32 positions: products of a few round otherwise than those of many,
        #    and a prompt alone must give what it gives in a batch.
        places = masked.flatten().int().argsort(descending=True, stable=True)
        places = places[: sum(row.masked for row in self.rows)]
        row, column = places // size, places % size
        parts = []
        for states in hidden.split(len(masked)):
            padded = pad(states[row, column], (0, 0, 0, -len(row) % 32))
            parts.append(self._model.lm_head(padded)[: len(row)].float())
        logits = parts[0]
        if self._guidance > 0:  # away from what a masked prompt gives
            logits = parts[1] + (1 + self._guidance) * (logits - parts[1])
        # 2. No mask token, no id without a token, no end that comes too early.
        _, early, _, _, random, key = rules[row].unbind(dim=1)
        logits[:, special.mask] = -torch.inf
        if special.vocabulary is not None:
            logits[:, special.vocabulary :] = -torch.inf
        too_early = (column < early)[:, None]
        logits[:, self._ends] = logits[:, self._ends].masked_fill(too_early, -torch.inf)
        # 3. The likeliest token, or a drawn one.
        key = hashed(hashed(key + column) + step)
        chosen = choose(logits, self.rows, key)
        # 4. Back in their places, with the confidence by which they settle.
        sure = uniform(~key, 1)[:, 0]
        if any(row.config.remasking != "random" for row in self.rows):
            probability = logits.softmax(dim=1).gather(1, chosen[:, None])[:, 0]
            sure = torch.where(random > 0, sure, probability)
        tokens = torch.full_like(masked, special.mask, dtype=torch.long)
        tokens[row, column] = chosen
        confidence = torch.full_like(masked, -torch.inf, dtype=torch.float)
        confidence[row, column] = sure
        return tokens, confidence


def pad_left(prompts: Sequence[Ids], block: int, padding: int) -> tuple[Tensor, Tensor]:
    """Prompts, padded on the left to one whole block or more, [rows, width]; True at tokens."""
    width = max(1, -(-max(map(len, prompts), default=0) // block)) * block
    rows = [[*[padding] * (width - len(prompt)), *prompt] for prompt in prompts]
    sizes = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.tensor(rows, dtype=torch.long).reshape(-1, width)
    return ids, torch.arange(-width, 0) >= -sizes[:, None]
