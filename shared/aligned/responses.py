"""The responses of one conversation in two tokenisations, and the chunks that they share (DESIGN §3)."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from shared.aligned.alignment import Chunks, Region, align_region, common_prefix, token_boundaries
from shared.text.rendered import RenderedChat
from shared.text.tokenizers import Tokenizer


@dataclass(frozen=True)
class Side:
    """One tokenizer's view of a conversation: all ids, and each response by the number of its message."""

    tokenizer: Tokenizer
    ids: Int[np.ndarray, " length"]
    spans: Int[np.ndarray, "spans 2"]
    bodies: tuple[tuple[str, str], ...]
    """Of each span the text in front of the answer's own words, and these words."""
    messages: tuple[int, ...]
    """Of each span the number of its message."""

    @classmethod
    def of(cls, chat: RenderedChat, parts: Sequence[Sequence[int]], tokenizer: Tokenizer) -> Side:
        """From the ids of prompt, response, prompt, response, …"""
        ends = np.cumsum([len(part) for part in parts])
        spans = np.array(
            [[ends[i - 1], ends[i]] for i in range(1, len(parts), 2)], np.int32
        ).reshape(-1, 2)
        ids = np.array([i for part in parts for i in part], np.int32)
        bodies = tuple(
            (chat.text[t.start : t.body[0]], chat.text[slice(*t.body)]) for t in chat.turns
        )
        return cls(tokenizer, ids, spans, bodies, tuple(t.message for t in chat.turns))

    @property
    def starts(self) -> list[int]:
        """Where the responses begin."""
        return self.spans[:, 0].tolist()

    def response(self, k: int) -> Int[np.ndarray, " tokens"]:
        """Ids of response `k`."""
        return self.ids[self.spans[k, 0] : self.spans[k, 1]]


def align_responses(student: Side, teacher: Side, counts: Counter[str]) -> Chunks:
    """Chunks of all responses that both have, in positions of the whole sequences."""
    parts = [np.zeros((0, 4), np.int32)]
    lost = 0
    for k, message in enumerate(student.messages):
        if message not in teacher.messages:
            continue
        other = teacher.messages.index(message)
        found, whole, aligned = _align(student, k, teacher, other)
        shift = np.array([teacher.starts[other]] * 2 + [student.starts[k]] * 2, np.int32)
        parts.append(found + shift)
        counts["response_bytes"] += whole
        lost += whole - aligned
    counts["unaligned_bytes"] += lost
    counts["unaligned_examples"] += lost > 0
    return np.concatenate(parts)


def _align(student: Side, k: int, teacher: Side, other: int) -> tuple[Chunks, int, int]:
    """Chunks of one response, the bytes of its words, and how many of these the chunks may cover.

    A tokenizer may normalise its text (Qwen's applies NFC). Then the chunks cover the bytes up to the first change.
    Where both normalise alike, nothing is lost.
    """
    (s_lead, s_text), (t_lead, t_text) = student.bodies[k], teacher.bodies[other]
    text = s_text.encode()
    if s_text != t_text:  # one template altered the content, say by stripping it
        text = text[: common_prefix(text, t_text.encode())]
    s_bytes, s_start = _bytes_from(student.tokenizer, student.response(k), s_lead)
    t_bytes, t_start = _bytes_from(teacher.tokenizer, teacher.response(other), t_lead)
    length, whole = _common_length(s_bytes[s_start:], t_bytes[t_start:], text), len(text)
    if length < whole:
        composed = unicodedata.normalize("NFC", s_text).encode()
        again = _common_length(s_bytes[s_start:], t_bytes[t_start:], composed)
        if again > length:
            length, whole = again, len(composed)
    s_edges = _edges(student, k, s_bytes, s_start)
    t_edges = _edges(teacher, other, t_bytes, t_start)
    return align_region(t_edges, s_edges, Region(t_start, s_start, length)), whole, length


def _bytes_from(
    tokenizer: Tokenizer, ids: Int[np.ndarray, " tokens"], lead: str
) -> tuple[bytes, int]:
    """Bytes of a response's tokens, and where in them its own words begin.

    A SentencePiece tokenizer writes a space in front of every text: the first token's, where the text has none.
    """
    found, front = b"".join(map(tokenizer.token_bytes.__getitem__, ids.tolist())), lead.encode()
    dummy = found[:1] == b" " and not front.startswith(b" ") and tokenizer.writes_space_in_front
    return found, len(front) + dummy


def _edges(side: Side, k: int, content: bytes, start: int) -> Int[np.ndarray, " boundaries"]:
    """Byte offsets of the tokens' edges. A first token that holds only white space before the words begins with
    them.
    """
    edges = token_boundaries(side.tokenizer.byte_lengths[side.response(k)])
    after = int(np.searchsorted(edges, start))
    if (
        after < len(edges)
        and edges[after] != start
        and not content[edges[after - 1] : start].strip()
    ):
        edges[after - 1] = start
    return edges


def _common_length(a: bytes, b: bytes, text: bytes) -> int:
    """How many bytes of `text` both `a` and `b` start with."""
    if a.startswith(text) and b.startswith(text):
        return len(text)
    return min(common_prefix(a, text), common_prefix(b, text))
