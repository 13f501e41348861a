"""The counted map between two vocabularies: what a teacher's token reads in the student's tokens.

Each student token of a chunk has an owner, the teacher token of that chunk with most bytes in
common, and a place d in it: of the first token that it owns by how many bytes that one begins
behind it, of the n-th behind the first 8 + n. Over plain text, without a model, E[t, d](s) is the
share of s among the student tokens that a token t owns at d.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int

from shared.aligned.alignment import Chunks, token_boundaries
from shared.aligned.examples import Prepared
from shared.cache.row import TokenMap
from shared.text.tokenizers import Tokenizer

_FURTHEST, _LAST = 8, 15  # bytes, and tokens behind the first: more counts as these
_MOST = 8  # student tokens of one (t, d)


def owners(
    chunks: Chunks, teacher_bytes: Int[np.ndarray, " a"], student_bytes: Int[np.ndarray, " b"]
) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " tokens"], Int[np.ndarray, " tokens"]]:
    """Of every student token of `chunks` its position, its owner's (the later one of two with as
    many bytes in common), and its place. `teacher_bytes`, `student_bytes`: lengths of the tokens.
    """
    # 1. The student's tokens, chunk by chunk, in bytes from the start of their chunk.     (tokens)
    own = chunks[:, 3] - chunks[:, 2]
    chunk = np.repeat(np.arange(len(chunks)), own)
    position = chunks[chunk, 2] + _counted(own)
    at = token_boundaries(student_bytes)
    start, end = (at[position + i] - at[chunks[chunk, 2]] for i in (0, 1))
    # 2. Each beside every teacher token of its chunk.                                      (pairs)
    theirs = (chunks[:, 1] - chunks[:, 0])[chunk]
    token = np.repeat(np.arange(len(position)), theirs)
    number = _counted(theirs)
    first = chunks[chunk[token], 0]
    at = token_boundaries(teacher_bytes)
    teacher_start, teacher_end = (at[first + number + i] - at[first] for i in (0, 1))
    common = np.minimum(end[token], teacher_end) - np.maximum(start[token], teacher_start)
    # 3. The one with most bytes in common; among equals the last.                         (tokens)
    if not len(position):
        return position, position, position
    most = 1 + number.max()
    best = np.maximum.reduceat(common * most + number, np.cumsum(theirs) - theirs) % most
    owner = chunks[chunk, 0] + best
    # 4. Its place: bytes of the first of an owner's, the number of each other one.
    first = np.concatenate([[True], owner[1:] != owner[:-1]])
    number = np.arange(len(owner)) - np.flatnonzero(first)[np.cumsum(first) - 1]
    behind = start - (at[owner] - at[chunks[chunk, 0]])
    bytes_behind = behind.clip(-_FURTHEST, _FURTHEST)
    return position, owner, np.where(first, bytes_behind, _FURTHEST + number.clip(max=_LAST))


def _counted(sizes: Int[np.ndarray, " n"]) -> Int[np.ndarray, " total"]:
    """0 … size − 1 for each size, one after the other."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def count_map(examples: Iterable[Prepared], teacher: Tokenizer, student: Tokenizer) -> TokenMap:
    """The map over the chunks of `examples`. Where a token was never seen at d, the student's own
    spelling of its bytes says what is there.
    """
    lengths = teacher.byte_lengths, student.byte_lengths
    width, places = len(student.byte_lengths), 2 * _FURTHEST + _LAST + 1

    def keys(token: np.ndarray, place: np.ndarray, own: np.ndarray) -> np.ndarray:
        return (token.astype(np.int64) * places + place + _FURTHEST) * width + own

    # 1. How often each (t, d, s) stands in the text.
    seen = [np.zeros(0, np.int64)]
    for example in examples:
        theirs, own = example.teacher_ids, example.student_ids
        assert theirs is not None
        position, owner, place = owners(example.chunks, lengths[0][theirs], lengths[1][own])
        seen.append(keys(theirs[owner], place, own[position]))
    key, count = np.unique(np.concatenate(seen), return_counts=True)
    # 2. The spelling of what was not seen, as if it were seen once.
    spelled = np.unique(keys(*_spelling(teacher, student)))
    spelled = spelled[~np.isin(spelled // width, key // width)]
    key, count = np.concatenate([key, spelled]), np.concatenate([count, np.ones_like(spelled)])
    # 3. Shares of each (t, d), the largest of them.
    pair = key // width
    order = np.lexsort((-count, pair))
    key, count, pair = key[order], count[order], pair[order]
    _, sizes = np.unique(pair, return_counts=True)
    total = np.add.reduceat(count, np.cumsum(sizes) - sizes) if len(sizes) else count
    share = (count / np.repeat(total, sizes)).astype(np.float32)
    kept = _counted(sizes) < _MOST
    key, share = key[kept], share[kept]
    token, place = (x.astype(np.int32) for x in np.divmod(key // width, places))
    return TokenMap(token, place - _FURTHEST, (key % width).astype(np.int32), share, *lengths)


def _spelling(teacher: Tokenizer, student: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(t, d, s) of the student's own spelling of each teacher token; the end of a turn is its own.

    Bytes that are no text, or that the student spells otherwise, have its longest token that they
    begin with.
    """
    table = student.token_bytes
    known = {b: i for i, b in enumerate(table) if b and i not in student.added_ids}
    plain = [(t, b) for t, b in enumerate(teacher.token_bytes) if b and t not in teacher.added_ids]
    texts = [b.decode("utf-8", "replace") for _, b in plain]
    found = [(t, 0, s) for t, s in zip(teacher.turn_ends, student.turn_ends, strict=False)][:1]
    for (t, spelled), ids in zip(plain, student.encode(texts), strict=True):
        own = ids
        if b"".join(table[s] for s in ids) != spelled:
            prefixes = (spelled[:n] for n in range(len(spelled), 0, -1))
            own = [known[b] for b in prefixes if b in known][:1]
        for number, s in enumerate(own[: _LAST + 1]):
            found.append((t, _FURTHEST + number if number else 0, s))
    columns = np.array(found, np.int64).reshape(-1, 3)
    return columns[:, 0], columns[:, 1], columns[:, 2]
