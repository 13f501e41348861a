import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shared.aligned.alignment import align_bytes, common_prefix, token_boundaries
from shared.text.byte_level import byte_level_bytes


def align(
    teacher: Sequence[int], student: Sequence[int], length: int, starts: tuple[int, int] = (0, 0)
) -> np.ndarray:
    """Chunks of tokens of these lengths, within `length` bytes."""
    sides = (token_boundaries(np.array(side, np.int64)) for side in (teacher, student))
    return align_bytes(*sides, length, *starts)


def test_reproduces_the_golden_chunks(golden: Path) -> None:
    document = json.loads((golden / "alignment.json").read_text())
    assert document["cases"]
    for case in document["cases"]:
        names = ("teacher_tokens", "student_tokens")
        teacher, student = ([len(byte_level_bytes(t) or b"") for t in case[n]] for n in names)
        assert align(teacher, student, sum(teacher)).tolist() == case["chunks"]


def cuts(total: int) -> st.SearchStrategy[list[int]]:
    """Token lengths that add up to `total`."""
    return st.lists(st.integers(0, total), max_size=total).map(
        lambda points: np.diff([0, *sorted(set(points) - {0, total}), total]).tolist()
    )


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(cuts(n), cuts(n))))
def test_chunks_partition_the_text_in_order_and_are_minimal(
    sides: tuple[list[int], list[int]],
) -> None:
    teacher, student = sides
    chunks = align(teacher, student, sum(teacher))
    t_edges, s_edges = (np.cumsum([0, *side]) for side in sides)
    # In order and gapless on both sides, from the first byte to the last.
    assert chunks[0, 0] == chunks[0, 2] == 0
    assert (chunks[-1, 1], chunks[-1, 3]) == (len(teacher), len(student))
    assert (chunks[1:, [0, 2]] == chunks[:-1, [1, 3]]).all()
    for t0, t1, s0, s1 in chunks:
        # Same bytes on both sides …
        assert (t_edges[t0], t_edges[t1]) == (s_edges[s0], s_edges[s1])
        # … and no common boundary inside: minimal.
        assert not set(t_edges[t0 + 1 : t1]) & set(s_edges[s0 + 1 : s1])


@given(
    st.integers(1, 40).flatmap(lambda n: st.tuples(cuts(n), cuts(n))),
    st.lists(st.integers(1, 9), max_size=4),
    st.lists(st.integers(1, 9), max_size=4),
    st.integers(0, 40),
)
def test_a_stretch_keeps_to_its_bytes(
    sides: tuple[list[int], list[int]], before_t: list[int], before_s: list[int], length: int
) -> None:
    """Tokens before it, of other lengths on either side, shift indices and nothing else."""
    teacher, student = sides
    length = min(length, sum(teacher))
    plain = align(teacher, student, length)
    starts = sum(before_t), sum(before_s)
    shifted = align(before_t + teacher, before_s + student, length, starts)
    assert (shifted == plain + np.array([len(before_t)] * 2 + [len(before_s)] * 2)).all()
    if len(plain):
        assert np.cumsum(teacher)[plain[-1, 1] - 1] <= length


def test_what_belongs_to_no_chunk() -> None:
    """Tokens over the edge, and bytes outside of common boundaries; a token of zero bytes is none
    of its own.
    """
    # Teacher: [ab][cd][ef]; student: [a][bcd][e][f]; bytes 1 … 6.
    assert align([2, 2, 2], [1, 3, 1, 1], 5, (1, 1)).tolist() == [[2, 3, 2, 4]]
    assert align([3, 3], [6], 5).shape == align([], [], 0).shape == (0, 4)
    assert align([2, 0, 2], [2, 2], 4).tolist() == [[0, 2, 0, 1], [2, 3, 1, 2]]


@given(st.binary(max_size=30), st.binary(max_size=30))
def test_common_prefix(a: bytes, b: bytes) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n in (len(a), len(b)) or a[n] != b[n]
