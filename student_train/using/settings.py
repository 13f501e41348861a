"""How a student's tokens are chosen, and the ids that mean something to the sampler."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from shared.settings.build import require, strict

Ids = Sequence[int]
Remasking = Literal["low_confidence", "random"]


@strict
class SampleConfig:
    """How to sample. `temperature` 0 is greedy; above, logits / temperature get Gumbel noise."""

    new_tokens: int = 256
    """At most so many: the last block is decoded as a whole one, and what is more of it cut off."""
    min_new_tokens: int = 0
    """No EOS among the first so many."""
    block: int = 32
    steps_per_block: int | None = None
    """Each step settles block / steps_per_block tokens; None: one token a step. A first block that
    begins with the end of the prompt takes fewer steps."""
    remasking: Remasking = "low_confidence"
    """Which positions stay masked longest: those of the lowest probability, or random ones."""
    threshold: float | None = None
    """In place of a fixed number: every position above this probability, at least one a step."""
    temperature: float = 0.0
    top_k: int | None = None
    """With a temperature: sampled from so many of the likeliest tokens."""
    top_p: float = 1.0
    """With a temperature: from the likeliest tokens of this probability together, after top_k."""
    guidance: float = 0.0
    """Classifier-free guidance: logits move away from those of a masked prompt by this factor."""
    seed: int = 0
    compile: bool = False
    """torch.compile of the passes of a block: worth its minute where a GPU samples much."""

    def __post_init__(self) -> None:
        steps, top_k = self.steps_per_block, self.top_k
        limits = {
            "new_tokens": ("positive", self.new_tokens > 0),
            "block": ("positive", self.block > 0),
            "min_new_tokens": ("0 to new_tokens", 0 <= self.min_new_tokens <= self.new_tokens),
            "steps_per_block": (f"1 to {self.block}", steps is None or 1 <= steps <= self.block),
            "remasking": ("low_confidence or random", self.remasking in get_args(Remasking)),
            "threshold": ("in [0, 1]", self.threshold is None or 0 <= self.threshold <= 1),
            "temperature": ("0 to 1e6", 0 <= self.temperature <= 1e6),
            "top_k": ("1 or more; 0 or -1: all", top_k is None or top_k >= -1),
            "top_p": ("in (0, 1]", 0 < self.top_p <= 1),
            "guidance": ("0 to 1e6", 0 <= self.guidance <= 1e6),
        }
        for name, (limit, holds) in limits.items():
            require(holds, f"{name} is {getattr(self, name)!r}; it must be {limit}")


@dataclass(frozen=True)
class Special:
    """Ids with a meaning to the sampler."""

    mask: int
    eos: int
    ends: tuple[int, ...] = ()
    """Other tokens that end a response, such as the chat template's end of turn."""
    vocabulary: int | None = None
    """Ids from here on are padding of the embedding: no token has them, and none is sampled."""
