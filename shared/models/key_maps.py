"""Where the tensors of a checkpoint go: renamed, split by rows, or stacked into one tensor of all experts.

Rules are data. A rule matches a key by a regular expression; its targets may use the groups (`\\1`, …).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Placement:
    """One destination: rows `source` of the tensor (None: all of it) go to rows `rows` (None: all) of `name`,
    inside the slab of expert `expert` where it is given.
    """

    name: str
    source: slice | None = None
    expert: int | None = None
    rows: slice | None = None


@dataclass(frozen=True)
class Rename:
    """The whole tensor under another name."""

    pattern: str
    target: str

    def place(self, match: re.Match[str], config: PreTrainedConfig) -> list[Placement]:
        """The one destination."""
        return [Placement(match.expand(self.target))]


@dataclass(frozen=True)
class SplitRows:
    """A fused tensor whose rows belong to several parameters, in order. `sizes` reads their heights."""

    pattern: str
    targets: tuple[str, ...]
    sizes: Callable[[PreTrainedConfig], tuple[int, ...]]

    def place(self, match: re.Match[str], config: PreTrainedConfig) -> list[Placement]:
        """One destination a target."""
        places, start = [], 0
        for target, size in zip(self.targets, self.sizes(config), strict=True):
            places.append(Placement(match.expand(target), source=slice(start, start + size)))
            start += size
        return places


@dataclass(frozen=True)
class StackExperts:
    """One expert's matrix as a slab of the stacked parameter; the pattern's group `expert` is its number.

    `part` of `parts`: which stretch of the slab's rows it fills (gate and up projections share a slab).
    """

    pattern: str
    target: str
    part: int = 0
    parts: int = 1

    def place(self, match: re.Match[str], config: PreTrainedConfig) -> list[Placement]:
        """The expert's stretch of its slab."""
        rows = None
        if self.parts > 1:
            height = int(config.moe_intermediate_size)
            rows = slice(self.part * height, (self.part + 1) * height)
        return [Placement(match.expand(self.target), expert=int(match["expert"]), rows=rows)]


Rule = Rename | SplitRows | StackExperts


def place(key: str, rules: tuple[Rule, ...], config: PreTrainedConfig) -> list[Placement]:
    """Where the tensor `key` goes, by the first rule that matches; empty if none does."""
    for rule in rules:
        if match := re.fullmatch(rule.pattern, key):
            return rule.place(match, config)
    return []
