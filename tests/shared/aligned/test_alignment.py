import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shared.aligned.alignment import Region, align_tokens, common_prefix
from shared.text.byte_level import byte_level_bytes


def test_reproduces_the_golden_chunks(golden: Path) -> None:
    document = json.loads((golden / "alignment.json").read_text())
    assert document["cases"]
    for case in document["cases"]:
        teacher = np.array([len(byte_level_bytes(t) or b"") for t in case["teacher_tokens"]])
        student = np.array([len(byte_level_bytes(t) or b"") for t in case["student_tokens"]])
        region = Region(0, 0, int(teacher.sum()))
        assert align_tokens(teacher, student, [region]).tolist() == case["chunks"]


def cuts(total: int) -> st.SearchStrategy[list[int]]:
    """Token lengths that add up to `total`."""
    return st.lists(st.integers(0, total), max_size=total).map(
        lambda points: np.diff([0, *sorted(set(points) - {0, total}), total]).tolist()
    )


@given(st.integers(1, 60).flatmap(lambda n: st.tuples(cuts(n), cuts(n))))
def test_chunks_partition_the_text_in_order_and_are_minimal(
    sides: tuple[list[int], list[int]],
) -> None:
    teacher, student = map(np.array, sides)
    chunks = align_tokens(teacher, student, [Region(0, 0, int(teacher.sum()))])
    t_edges, s_edges = (np.concatenate([[0], np.cumsum(side)]) for side in (teacher, student))
    # In order and gapless on both sides, from the first byte to the last.
    assert chunks[0, 0] == chunks[0, 2] == 0
    assert (chunks[-1, 1], chunks[-1, 3]) == (len(teacher), len(student))
    assert (chunks[1:, 0] == chunks[:-1, 1]).all()
    assert (chunks[1:, 2] == chunks[:-1, 3]).all()
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
def test_a_region_keeps_to_its_bytes(
    sides: tuple[list[int], list[int]], before_t: list[int], before_s: list[int], length: int
) -> None:
    """Tokens before the region, of other lengths on either side, shift indices and nothing else."""
    teacher, student = sides
    length = min(length, sum(teacher))
    plain = align_tokens(np.array(teacher), np.array(student), [Region(0, 0, length)])
    region = Region(sum(before_t), sum(before_s), length)
    shifted = align_tokens(np.array(before_t + teacher), np.array(before_s + student), [region])
    assert (shifted == plain + np.array([len(before_t)] * 2 + [len(before_s)] * 2)).all()
    if len(plain):
        assert np.cumsum(teacher)[plain[-1, 1] - 1] <= length


def test_tokens_over_the_edge_and_bytes_outside_common_boundaries_belong_to_no_chunk() -> None:
    # Teacher: [ab][cd][ef]; student: [a][bcd][e][f]; region: bytes 1 … 6.
    chunks = align_tokens(np.array([2, 2, 2]), np.array([1, 3, 1, 1]), [Region(1, 1, 5)])
    assert chunks.tolist() == [[2, 3, 2, 4]]


def test_no_common_boundary_no_chunk_and_a_token_of_zero_bytes_is_none_of_its_own() -> None:
    assert align_tokens(np.array([3, 3]), np.array([6]), [Region(0, 0, 5)]).shape == (0, 4)
    none = np.array([], np.int64)
    assert align_tokens(none, none, [Region(0, 0, 0)]).shape == (0, 4)
    chunks = align_tokens(np.array([2, 0, 2]), np.array([2, 2]), [Region(0, 0, 4)])
    assert chunks.tolist() == [[0, 2, 0, 1], [2, 3, 1, 2]]


@given(st.binary(max_size=30), st.binary(max_size=30))
def test_common_prefix(a: bytes, b: bytes) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n in (len(a), len(b)) or a[n] != b[n]
