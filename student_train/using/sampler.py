"""Block diffusion sampling: blocks from left to right, each from all masks to tokens in a few steps (BD3LM, LLaDA).

Keys and values of everything finished are cached: no token of the prefix is encoded twice. Prompts are padded on the
left so that each ends where a block ends, as the reference does; padding is hidden, so a batch of unequal prompts gives
what each gives alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from shared.attention import block_causal


@dataclass(frozen=True)
class SampleConfig:
    """How to sample. `temperature` 0 is greedy; above, Gumbel noise is added to logits / temperature."""

    new_tokens: int = 256
    """At most so many; where they are no whole number of blocks, the last block is shorter."""
    min_new_tokens: int = 0
    """No EOS among the first so many."""
    block: int = 32
    steps_per_block: int | None = None
    """Each step settles block / steps_per_block tokens (one more in the first steps where that is no whole number);
    None: one token a step.
    """
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    """Which positions stay masked longest: those of the lowest probability, or random ones."""
    threshold: float | None = None
    """Settle every position whose probability exceeds this, at least one a step, in place of a fixed number."""
    temperature: float = 0.0
    guidance: float = 0.0
    """Classifier-free guidance: logits move away from those of a masked prompt by this factor."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.block < 1 or self.new_tokens < 1:
            raise ValueError(f"new_tokens is {self.new_tokens}, block {self.block}; both must be positive")
        if self.steps_per_block is not None and not 1 <= self.steps_per_block <= self.block:
            raise ValueError(f"steps_per_block is {self.steps_per_block}; it must be 1 to {self.block}, the block")
        if self.remasking not in ("low_confidence", "random"):
            raise ValueError(f"remasking is {self.remasking!r}; it must be low_confidence or random")
        if not 0 <= self.min_new_tokens <= self.new_tokens:
            raise ValueError(f"min_new_tokens is {self.min_new_tokens}; it must be 0 to new_tokens, {self.new_tokens}")
        if not 0 <= self.temperature < math.inf or (self.threshold is not None and not 0 <= self.threshold < 1):
            raise ValueError("temperature must not be negative, threshold must lie in [0, 1)")


@dataclass(frozen=True)
class Special:
    """Ids with a meaning to the sampler."""

    mask: int
    pad: int
    eos: int
    ends: tuple[int, ...] = ()
    """Other tokens that end a response, such as the chat template's end of turn."""
    vocabulary: int | None = None
    """Ids from here on are padding of the embedding: no token has them, and none is sampled."""


def sample(model: Any, prompts: Sequence[Sequence[int]], special: Special, config: SampleConfig) -> list[list[int]]:
    """The response to each prompt, up to its first EOS (or other end), which is left out. ValueError where a prompt
    is empty.
    """
    tokens = torch.zeros(len(prompts), 0, dtype=torch.long)
    for tokens, _ in sample_steps(model, prompts, special, config):  # noqa: B007 - the last state counts
        pass
    return [until_eos(row, special.eos) for row in tokens.tolist()]


def until_eos(row: list[int], eos: int) -> list[int]:
    """What stands before the first EOS."""
    return row[: row.index(eos)] if eos in row else row


Stop = Callable[[int, list[int]], bool]
"""Whether a row, by its place in the batch and its new tokens, needs no more of them. Asked after each block."""


@torch.no_grad()
def sample_steps(
    model: Any, prompts: Sequence[Sequence[int]], special: Special, config: SampleConfig, stop: Stop | None = None
) -> Iterator[tuple[Int[Tensor, "batch new"], int]]:
    """The new tokens after each step (those still masked are the mask's id), and the passes so far.

    A row with an EOS in a finished block, or that `stop` ends, leaves the batch; what follows in it is EOS. Ends early
    when all have left.
    """
    state = _State(model, prompts, special, config, stop)
    for start in range(0, config.new_tokens, config.block):
        yield from state.next_block(min(config.block, config.new_tokens - start))
        if state.all_ended:
            return


class _State:
    """Prompt and finished blocks in the cache, and what is not in it yet, of the rows that go on."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        special: Special,
        config: SampleConfig,
        stop: Stop | None,
    ) -> None:
        if not prompts or not all(prompts):
            raise ValueError("a prompt is empty; each needs at least one token")
        self._model, self._special, self._config, self._stop = model, special, config, stop
        self._device = model.get_input_embeddings().weight.device
        self._guided = config.guidance > 0
        ids, valid = pad_left(prompts, config.block, special.pad)
        if self._guided:  # the second half of the batch has its prompt masked
            ids, valid = torch.cat([ids, torch.where(valid, special.mask, ids)]), valid.repeat(2, 1)
        self._pending, self._valid = ids.to(self._device), valid.to(self._device)
        self._cache = DynamicCache()
        self._cached = 0
        self._new = torch.zeros(len(prompts), 0, dtype=torch.long, device=self._device)
        self._rows = torch.arange(len(prompts), device=self._device)
        self._noise = [_generator(config.seed, prompt) for prompt in prompts]
        self._passes = 0
        self._ends = torch.tensor([special.eos, *special.ends], device=self._device)

    @property
    def all_ended(self) -> bool:
        """Whether no row goes on."""
        return len(self._rows) == 0

    def next_block(self, size: int) -> Iterator[tuple[Tensor, int]]:
        """Settle one block of `size` positions, step by step."""
        block = torch.full((len(self._rows), size), self._special.mask, device=self._device)
        step = 0
        while bool((masked := block == self._special.mask).any()):
            tokens, confidence = self._choose(self._hidden(block), masked)
            settled = self._settle(confidence, masked, step)
            block = torch.where(settled, tokens, block)
            step += 1
            yield self._with(block), self._passes
        ends = torch.isin(block, self._ends)
        block = torch.where(ends.cumsum(dim=1) > 0, self._special.eos, block)
        self._new = self._with(block)
        self._pending = block.repeat(2, 1) if self._guided else block
        self._drop_ended()
        yield self._new, self._passes

    def _with(self, block: Int[Tensor, "going block"]) -> Int[Tensor, "batch new"]:
        """The new tokens of all rows, this block included; of rows that have ended it is EOS."""
        whole = torch.full((len(self._new), block.shape[1]), self._special.eos, device=self._device)
        whole[self._rows] = block
        return torch.cat([self._new, whole], dim=1)

    def _drop_ended(self) -> None:
        """Rows that need no more tokens leave the batch, and so cost nothing."""
        new = self._new[self._rows]
        going = ~(new == self._special.eos).any(dim=1)
        if self._stop is not None:
            stopped = [self._stop(row, tokens) for row, tokens in zip(self._rows.tolist(), new.tolist(), strict=True)]
            going &= ~torch.tensor(stopped, device=self._device)
        if bool(going.all()):
            return
        kept = going.nonzero()[:, 0]
        both = torch.cat([kept, kept + len(going)]) if self._guided else kept
        self._rows, self._pending, self._valid = self._rows[kept], self._pending[both], self._valid[both]
        self._cache.batch_select_indices(both)
        self._noise = [self._noise[i] for i in kept.tolist()]

    def _hidden(self, block: Int[Tensor, "batch block"]) -> Float[Tensor, "rows block width"]:
        """Hidden states of the block at hand. What is pending goes through with it and stays in the cache."""
        block = block.repeat(2, 1) if self._guided else block
        ids = torch.cat([self._pending, block], dim=1)
        known = self._cached + self._pending.shape[1]
        if self._valid.shape[1] < known + block.shape[1]:
            more = known + block.shape[1] - self._valid.shape[1]
            self._valid = torch.cat([self._valid, torch.ones_like(self._valid[:, :1]).expand(-1, more)], dim=1)
        mask = block_causal(self._valid, self._config.block)[:, :, self._cached :]
        positions = torch.arange(self._cached, known + block.shape[1], device=self._device).expand(len(ids), -1)
        output = self._model.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self._cache, use_cache=True
        )
        self._cache.crop(-block.shape[1])  # the noised block does not stay
        self._cached, self._pending = known, ids[:, :0]
        self._passes += 1
        return output.last_hidden_state[:, -block.shape[1] :]

    def _logits(
        self, hidden: Float[Tensor, "rows block width"], masked: Bool[Tensor, "batch block"]
    ) -> Float[Tensor, "n vocab"]:
        """Logits of the masked positions alone, one after the other; no mask token, no EOS that comes too early."""
        parts = [self._head(part[masked]) for part in hidden.split(len(masked))]
        logits = parts[0]
        if self._guided:  # away from what a masked prompt gives
            logits = parts[1] + (1 + self._config.guidance) * (logits - parts[1])
        logits[:, self._special.mask] = -torch.inf
        if self._special.vocabulary is not None:
            logits[:, self._special.vocabulary :] = -torch.inf
        early = self._config.min_new_tokens - self._new.shape[1]
        if early > 0:
            column = masked.nonzero()[:, 1]
            logits[:, self._ends] = logits[:, self._ends].masked_fill((column < early)[:, None], -torch.inf)
        return logits

    def _head(self, rows: Float[Tensor, "n width"]) -> Float[Tensor, "n vocab"]:
        """The LM head on whole multiples of 32 rows: products of a few rows round otherwise than those of many, and a
        prompt alone must give what it gives in a batch.
        """
        padded = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % 32))
        return self._model.lm_head(padded)[: len(rows)].float()

    def _choose(
        self, hidden: Float[Tensor, "rows block width"], masked: Bool[Tensor, "batch block"]
    ) -> tuple[Int[Tensor, "batch block"], Float[Tensor, "batch block"]]:
        """A token for each masked position, and its probability (or a random number); elsewhere nothing of use."""
        config = self._config
        logits = self._logits(hidden, masked)
        if config.temperature > 0:
            shape = torch.Size((masked.shape[1], logits.shape[1]))
            noise = torch.cat([_gumbel(shape, g)[row.cpu()] for g, row in zip(self._noise, masked, strict=True)])
            chosen = (logits / config.temperature + noise.to(logits.device)).argmax(dim=1)
        else:
            chosen = logits.argmax(dim=1)
        tokens = torch.full(masked.shape, self._special.mask, device=logits.device).masked_scatter(masked, chosen)
        if config.remasking == "random":
            random = [torch.rand(masked.shape[1], generator=g) for g in self._noise]
            return tokens, torch.stack(random).to(logits.device)
        probability = logits.softmax(dim=1).gather(1, chosen[:, None])[:, 0]
        return tokens, torch.zeros(masked.shape, device=logits.device).masked_scatter(masked, probability)

    def _settle(
        self, confidence: Float[Tensor, "batch block"], masked: Bool[Tensor, "batch block"], step: int
    ) -> Bool[Tensor, "batch block"]:
        """Which masked positions are final after this step: the most confident ones."""
        config = self._config
        confidence = torch.where(masked, confidence, -torch.inf)
        rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        if config.threshold is not None:
            return masked & ((rank == 0) | (confidence > config.threshold))
        size = confidence.shape[1]
        count, more = divmod(size, min(size, config.steps_per_block or size))
        return masked & (rank < count + (step < more))


def pad_left(prompts: Sequence[Sequence[int]], block: int, pad: int) -> tuple[Tensor, Tensor]:
    """Prompts, padded on the left to whole blocks; True where a token is."""
    width = -(-max(map(len, prompts)) // block) * block
    ids = torch.full((len(prompts), width), pad)
    valid = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        valid[row, width - len(prompt) :] = True
    return ids, valid


def _generator(seed: int, prompt: Sequence[int]) -> torch.Generator:
    """Noise that depends on the seed and the prompt, not on the batch."""
    digest = hashlib.blake2b(f"{seed}:{list(prompt)}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


def _gumbel(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise; computed in float64, where log(−log u) keeps its tail."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return -torch.log(-torch.log(uniform)).float()
