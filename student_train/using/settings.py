"""How a student's tokens are chosen, and the ids that mean something to the sampler."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SampleConfig:
    """How to sample. `temperature` 0 is greedy; above, Gumbel noise is added to logits /
    temperature.
    """

    new_tokens: int = 256
    """At most so many; where they are no whole number of blocks, the last block is shorter."""
    min_new_tokens: int = 0
    """No EOS among the first so many."""
    block: int = 32
    steps_per_block: int | None = None
    """Each step settles block / steps_per_block tokens (one more in the first steps where that is
    no whole number); None: one token a step.
    """
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    """Which positions stay masked longest: those of the lowest probability, or random ones."""
    threshold: float | None = None
    """Settle every position whose probability exceeds this, at least one a step, in place of a
    fixed number.
    """
    temperature: float = 0.0
    top_k: int | None = None
    """With a temperature: sampled from so many of the likeliest tokens."""
    top_p: float = 1.0
    """With a temperature: sampled from the likeliest tokens that have this probability together,
    after top_k.
    """
    guidance: float = 0.0
    """Classifier-free guidance: logits move away from those of a masked prompt by this factor."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.block < 1 or self.new_tokens < 1:
            raise ValueError(
                f"new_tokens is {self.new_tokens}, block {self.block}; both must be positive"
            )
        if self.steps_per_block is not None and not 1 <= self.steps_per_block <= self.block:
            raise ValueError(
                f"steps_per_block is {self.steps_per_block}; it must be 1 to {self.block}, the "
                "block"
            )
        if self.remasking not in ("low_confidence", "random"):
            raise ValueError(
                f"remasking is {self.remasking!r}; it must be low_confidence or random"
            )
        if not 0 <= self.min_new_tokens <= self.new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}; it must be 0 to new_tokens, "
                f"{self.new_tokens}"
            )
        if not 0 <= self.temperature < math.inf or (
            self.threshold is not None and not 0 <= self.threshold < 1
        ):
            raise ValueError("temperature must not be negative, threshold must lie in [0, 1)")
        if (self.top_k is not None and self.top_k < 1) or not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_k is {self.top_k}, top_p {self.top_p:g}; top_k must be 1 or more, top_p in "
                "(0, 1]"
            )


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
