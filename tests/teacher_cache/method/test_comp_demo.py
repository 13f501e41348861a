import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shared.aligned.examples import Prepared
from shared.settings.config import NoiseConfig
from teacher_cache.method.comp_demo import draw_for, passes, teacher_view

MASK = 999
NO_CHUNKS = np.zeros((0, 4), np.int32)
CHUNKS = np.array([[3, 5, 2, 3], [5, 6, 3, 6], [6, 9, 6, 8]], np.int32)


def example(cross: bool) -> Prepared:
    return Prepared(
        "e", np.arange(10, dtype=np.int32), np.array([[2, 10]], np.int32),
        np.arange(100, 112, dtype=np.int32) if cross else None, CHUNKS if cross else NO_CHUNKS,
        shared=not cross, offsets=np.zeros(1, np.int32),
    )  # fmt: skip


@given(st.booleans(), st.booleans(), st.integers(0, 300), st.sampled_from([0.0, 0.5, 1.0]))
def test_every_masked_position_is_read_once_and_masked_when_read(
    cross: bool, comp_demo: bool, seed: int, ratio: float
) -> None:
    item = example(cross)
    noise = NoiseConfig(seed=seed, comp_demo=comp_demo, demo_ratio=ratio)
    draw = draw_for(item, noise, 0)
    view = teacher_view(item, draw)
    pairs = passes(view, MASK, comp_demo)
    order = [int(row) for _, rows in pairs for row in rows]
    assert sorted(order) == list(range(view.positions.size))
    for request, rows in pairs:
        assert request.read.size > 0  # a pass with nothing to read is not run
        assert (request.ids[request.read] == MASK).all()
        assert np.array_equal(request.gold, view.ids[request.read])
        assert np.array_equal(request.read, view.positions[rows])
        elsewhere = np.setdiff1d(np.arange(len(request.ids)), request.read)
        assert np.array_equal(request.ids[elsewhere], view.ids[elsewhere])  # the rest is revealed
    assert len(pairs) <= (2 if comp_demo and ratio == 0.5 else 1)
    if len(pairs) == 2:  # pass one reads B and reveals A
        assert np.array_equal(pairs[0][0].read, view.positions[~view.in_a])
    assert (view.ids != MASK).all()  # the example itself is untouched
    if cross:  # chunks are never split between the passes
        for chunk, part in enumerate(draw.split):
            assert (view.in_a[view.chunk_of == chunk] == part).all()
        places = [i for a, b in item.chunks[draw.chunks, :2] for i in range(a, b)]
        assert view.positions.tolist() == places


def test_nothing_masked_no_pass() -> None:
    for cross in (True, False):
        item = example(cross)
        none = np.zeros((0, 2), np.int32)
        empty = dataclasses.replace(
            item, student_ids=item.student_ids[:2], spans=none, chunks=NO_CHUNKS,
            offsets=item.offsets[:0],
        )  # fmt: skip
        view = teacher_view(empty, draw_for(empty, NoiseConfig(), 0))
        assert passes(view, MASK, True) == passes(view, MASK, False) == []
