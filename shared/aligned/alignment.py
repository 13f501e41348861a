"""Chunks between two tokenisations of one text (DESIGN §3; TIDE §2.3).

A chunk is a minimal span of bytes that starts and ends at a token boundary of both tokenisations. All positions
here are byte offsets or token indices; no characters, so a token may end inside a character.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

Chunks = Int[np.ndarray, "chunks 4"]
"""Columns: teacher_start, teacher_end, student_start, student_end, half-open, in tokens."""


@dataclass(frozen=True)
class Region:
    """A stretch of bytes that both texts share: where it starts in either text, and its length."""

    teacher_start: int
    student_start: int
    length: int


def token_boundaries(lengths: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " boundaries"]:
    """Byte offsets of the tokens' edges: 0, then the end of every token."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def common_prefix(a: bytes, b: bytes) -> int:
    """Number of bytes that `a` and `b` share from the start."""
    if a == b:
        return len(a)
    n = min(len(a), len(b))
    x, y = np.frombuffer(a, np.uint8, n), np.frombuffer(b, np.uint8, n)
    different = np.flatnonzero(x != y)
    return int(different[0]) if different.size else n


def align_region(
    teacher_boundaries: Int[np.ndarray, " a"],
    student_boundaries: Int[np.ndarray, " b"],
    region: Region,
) -> Chunks:
    """Chunks inside one region.

    Tokens that reach over the region's edge belong to no chunk; so do the bytes before the first and after the
    last boundary that both tokenisations have. Tokens of zero bytes are no chunk of their own.
    """
    t = _inside(teacher_boundaries, region.teacher_start, region.length)
    s = _inside(student_boundaries, region.student_start, region.length)
    if t.size == 0 or s.size == 0:
        return np.zeros((0, 4), np.int32)
    marks = np.zeros((2, region.length + 1), bool)
    marks[0, t] = True
    marks[1, s] = True
    common = np.flatnonzero(marks[0] & marks[1])
    if common.size < 2:
        return np.zeros((0, 4), np.int32)
    # The last of equal boundaries: a token of zero bytes goes to the chunk before it.
    ti = np.searchsorted(teacher_boundaries, common + region.teacher_start, side="right") - 1
    si = np.searchsorted(student_boundaries, common + region.student_start, side="right") - 1
    return np.stack([ti[:-1], ti[1:], si[:-1], si[1:]], axis=1).astype(np.int32)


def _inside(boundaries: Int[np.ndarray, " n"], start: int, length: int) -> Int[np.ndarray, " m"]:
    low = np.searchsorted(boundaries, start, side="left")
    high = np.searchsorted(boundaries, start + length, side="right")
    return boundaries[low:high] - start


def align_tokens(
    teacher_lengths: Int[np.ndarray, " a"],
    student_lengths: Int[np.ndarray, " b"],
    regions: list[Region],
) -> Chunks:
    """Chunks of all regions, in order. `*_lengths` are the tokens' lengths in bytes."""
    teacher, student = token_boundaries(teacher_lengths), token_boundaries(student_lengths)
    parts = [align_region(teacher, student, region) for region in regions]
    return np.concatenate(parts) if parts else np.zeros((0, 4), np.int32)
