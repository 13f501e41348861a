"""Chunks between two tokenisations of one text (TIDE §2.3).

A chunk is a minimal span of bytes that starts and ends at a token boundary of both tokenisations.
All positions here are byte offsets or token indices; no characters, so a token may end inside one.
"""

import unicodedata
from collections import Counter
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from shared.text.tokenizers import Tokenizer

Chunks = Int[np.ndarray, "chunks 4"]
"""Columns: teacher_start, teacher_end, student_start, student_end, half-open, in tokens."""


def token_boundaries(lengths: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " boundaries"]:
    """Byte offsets of the tokens' edges: 0, then the end of every token."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def align_bytes(
    teacher_boundaries: Int[np.ndarray, " a"],
    student_boundaries: Int[np.ndarray, " b"],
    length: int,
    teacher_start: int = 0,
    student_start: int = 0,
) -> Chunks:
    """Chunks inside a stretch of `length` bytes that both texts share, from these bytes on.

    Tokens that reach over its edge belong to no chunk; so do the bytes before the first and after
    the last boundary that both tokenisations have. Tokens of zero bytes are no chunk of their own.
    """
    # 1. The boundaries of each inside of the stretch, and those that both have.
    marks = np.zeros((2, length + 1), bool)
    sides = ((teacher_boundaries, teacher_start), (student_boundaries, student_start))
    for inside, (boundaries, start) in zip(marks, sides, strict=True):
        low = np.searchsorted(boundaries, start, side="left")
        high = np.searchsorted(boundaries, start + length, side="right")
        inside[boundaries[low:high] - start] = True
    common = np.flatnonzero(marks[0] & marks[1])
    if common.size < 2:
        return np.zeros((0, 4), np.int32)
    # 2. The last of equal boundaries: a token of zero bytes goes to the chunk before it.
    ti = np.searchsorted(teacher_boundaries, common + teacher_start, side="right") - 1
    si = np.searchsorted(student_boundaries, common + student_start, side="right") - 1
    return np.stack([ti[:-1], ti[1:], si[:-1], si[1:]], axis=1).astype(np.int32)


@dataclass(frozen=True)
class Side:
    """One tokenizer's view of a conversation.

    `spans` are the trained responses in tokens. Of each, `bodies` has the text in front of the
    answer's own words, and these words; `messages` has the number of its message.
    """

    tokenizer: Tokenizer
    ids: Int[np.ndarray, " length"]
    spans: Int[np.ndarray, "spans 2"]
    bodies: tuple[tuple[str, str], ...]
    messages: tuple[int, ...]


def align_responses(student: Side, teacher: Side, counts: Counter[str]) -> Chunks:
    """Chunks of all responses that both have, in positions of the whole sequences.

    A tokenizer may normalise its text (Qwen's applies NFC). Then the chunks of a response cover its
    bytes up to the first change; where both normalise alike, nothing is lost. `counts` adds up the
    bytes of the responses' words, and those among them that no chunk may cover.
    """
    parts = [np.zeros((0, 4), np.int32)]
    lost = 0
    for k, message in enumerate(student.messages):
        if message not in teacher.messages:
            continue
        other = teacher.messages.index(message)
        # 1. The answer's words, as far as both templates write the same ones.
        words, teacher_words = student.bodies[k][1], teacher.bodies[other][1]
        text = words.encode()
        if words != teacher_words:  # one template altered the content, say by stripping it
            text = text[: common_prefix(text, teacher_words.encode())]
        # 2. The bytes of either response's tokens from there on, and where both spell the words.
        s_edges, s_start, s_bytes = _located_words(student, k)
        t_edges, t_start, t_bytes = _located_words(teacher, other)
        aligned = min(common_prefix(s_bytes, text), common_prefix(t_bytes, text))
        whole = len(text)
        if aligned < whole:
            composed = unicodedata.normalize("NFC", words).encode()
            further = min(common_prefix(s_bytes, composed), common_prefix(t_bytes, composed))
            if further > aligned:
                aligned, whole = further, len(composed)
        # 3. Chunks inside of them, moved to where the responses stand.
        chunks = align_bytes(t_edges, s_edges, aligned, t_start, s_start)
        at_teacher, at_student = teacher.spans[other, 0], student.spans[k, 0]
        shift = np.array([at_teacher, at_teacher, at_student, at_student], np.int32)
        parts.append(chunks + shift)
        counts["response_bytes"] += whole
        lost += whole - aligned
    counts["unaligned_bytes"] += lost
    counts["unaligned_examples"] += lost > 0
    return np.concatenate(parts)


def _located_words(side: Side, k: int) -> tuple[Int[np.ndarray, " boundaries"], int, bytes]:
    """Byte offsets of the edges of response `k`'s tokens, where its own words begin, and the bytes
    from there on.
    """
    ids, lead = side.ids[slice(*side.spans[k])], side.bodies[k][0].encode()
    spelled = b"".join([side.tokenizer.token_bytes[i] for i in ids.tolist()])
    start = len(lead)
    # A SentencePiece tokenizer writes a space in front of a text that has none.
    if spelled.startswith(b" ") and not lead.startswith(b" "):
        start += side.tokenizer.writes_space_in_front
    # A token that holds only white space before the words begins with them.
    edges = token_boundaries(side.tokenizer.byte_lengths[ids])
    after = int(np.searchsorted(edges, start))
    inside_a_token = after < len(edges) and edges[after] != start
    if inside_a_token and not spelled[edges[after - 1] : start].strip():
        edges[after - 1] = start
    return edges, start, spelled[start:]


def common_prefix(a: bytes, b: bytes) -> int:
    """Number of bytes that `a` and `b` share from the start."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    x, y = np.frombuffer(a, np.uint8, n), np.frombuffer(b, np.uint8, n)
    return int(np.flatnonzero(x != y)[0])
