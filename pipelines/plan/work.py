"""A batch of work as it comes: conversations of a stated length, masked at times that are spread over their draws."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from shared.cache.manifest import Manifest
from shared.cache.row import CacheRow
from shared.settings.config import CacheConfig
from shared.system.errors import TideError
from teacher_cache.method.comp_demo import Request
from teacher_cache.run.costs import Workload, made_up_fingerprint, random_rows
from teacher_cache.teachers.registry import TeacherEntry


@dataclass(frozen=True)
class Conversations:
    """What the data is like: tokens of a conversation, and which share of them is answers."""

    tokens: int = 512
    response: float = 2 / 3

    def __post_init__(self) -> None:
        if self.tokens < 4 or not 0 < self.response <= 1:
            raise TideError(
                f"conversations of {self.tokens} tokens, {self.response:.0%} of them answers",
                expected="4 tokens or more, and a share above 0",
            )

    @property
    def prompt(self) -> int:
        """Tokens before the answer."""
        return self.tokens - max(1, round(self.tokens * self.response))

    def masked(self, draw: int, draws: int, random: np.random.Generator) -> np.ndarray:
        """Masked positions of one of `draws` draws, whose times are stratified."""
        t = (draw + random.random()) / draws
        places = np.arange(self.prompt, self.tokens)
        found = places[random.random(places.size) < t]
        return (found if found.size else places[:1]).astype(np.int32)


def requests_of(
    data: Conversations,
    examples: int,
    draws: int,
    comp_demo: bool,
    vocabulary: int,
    demo_ratio: float = 0.5,
) -> list[Request]:
    """The passes of some examples under all draws."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(examples):
        ids = random.integers(0, vocabulary - 1, data.tokens, np.int32)
        for draw in range(draws):
            masked = data.masked(draw, draws, random)
            part = random.random(masked.size) < (demo_ratio if comp_demo else 0.0)
            for read in (masked[~part], masked[part]):
                if read.size:
                    noised = ids.copy()
                    noised[read] = vocabulary - 1
                    found.append(Request(noised, read, ids[read]))
    return found


def rows_of(
    data: Conversations, config: CacheConfig, vocabulary: int, examples: int, draws: int
) -> list[CacheRow]:
    """Rows of a cache: `draws` of each example one after the other, every masked token a chunk."""
    random, made = np.random.default_rng(0), []
    for example in range(examples):
        first: CacheRow | None = None
        for draw in range(draws):
            masked = data.masked(draw, draws, random)
            load = Workload(1, 1, data.tokens, masked.size, data.tokens, masked.size, "")
            (row,) = random_rows(load, config, vocabulary, 1, draw)
            first = first or row
            made.append(
                dataclasses.replace(
                    row,
                    example_id=f"{example:016x}",
                    student_ids=first.student_ids,
                    t=(draw + 0.5) / draws,
                    spans=np.array([[data.prompt, data.tokens]], np.int32),
                    masked=masked,
                    chunk_student=None
                    if row.chunk_student is None
                    else np.stack([masked, masked + 1], axis=1),
                )
            )
    return made


def manifest_of(config: CacheConfig, entry: TeacherEntry, mask_id: int) -> Manifest:
    """As much of a cache's manifest as batches are made by."""
    fingerprint = made_up_fingerprint(config, entry.student_tokens, mask_id + 1, mask_id)
    return Manifest(fingerprint, config.noise.draws, 1, 1)
