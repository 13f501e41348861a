from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.aligned.examples import Prepared
from shared.settings.config import NoiseConfig
from teacher_cache.method.comp_demo import draw_for, passes, teacher_view

MASK = 999


def example(cross: bool) -> Prepared:
    chunks = (
        np.array([[3, 5, 2, 3], [5, 6, 3, 6], [6, 9, 6, 8]], np.int32)
        if cross
        else np.zeros((0, 4), np.int32)
    )
    teacher = np.arange(100, 112, dtype=np.int32) if cross else None
    spans = np.array([[2, 10]], np.int32)
    ids = np.arange(10, dtype=np.int32)
    return Prepared(
        "e", ids, spans, teacher, chunks, shared=not cross, offsets=np.zeros(1, np.int32)
    )


@given(st.booleans(), st.booleans(), st.integers(0, 300), st.sampled_from([0.0, 0.5, 1.0]))
def test_every_masked_position_is_read_once_and_masked_when_read(
    cross: bool, comp_demo: bool, seed: int, ratio: float
) -> None:
    item = example(cross)
    noise = NoiseConfig(seed=seed, comp_demo=comp_demo, demo_ratio=ratio)
    view = teacher_view(item, draw_for(item, noise, 0))
    found = passes(view, MASK, comp_demo)
    rows = np.concatenate([rows for _, rows in found]) if found else np.zeros(0, int)
    assert sorted(rows.tolist()) == list(range(view.positions.size))
    for request, rows in found:
        assert request.read.size > 0  # a pass with nothing to read is not run
        assert (request.ids[request.read] == MASK).all()
        assert np.array_equal(request.gold, view.ids[request.read])
        assert np.array_equal(request.read, view.positions[rows])
        elsewhere = np.setdiff1d(np.arange(len(request.ids)), request.read)
        assert np.array_equal(
            request.ids[elsewhere], view.ids[elsewhere]
        )  # the other part is revealed
    if not comp_demo or ratio != 0.5:
        assert len(found) <= 1
    assert (view.ids != MASK).all()  # the example itself is untouched


def test_pass_one_reads_b_and_reveals_a() -> None:
    item = example(cross=False)
    seed = next(s for s in range(99) if 0 < draw_for(item, NoiseConfig(seed=s), 0).split.mean() < 1)
    view = teacher_view(item, draw_for(item, NoiseConfig(seed=seed), 0))
    (first, _), (second, _) = passes(view, MASK, True)
    assert np.array_equal(first.read, view.positions[~view.in_a])
    assert np.array_equal(second.read, view.positions[view.in_a])


def test_chunks_are_never_split_between_the_passes() -> None:
    item = example(cross=True)
    for seed in range(50):
        draw = draw_for(item, NoiseConfig(seed=seed), 0)
        view = teacher_view(item, draw)
        for chunk, part in enumerate(draw.split):
            assert (view.in_a[view.chunk_of == chunk] == part).all()
        expected = np.concatenate(
            [np.arange(a, b) for a, b in item.chunks[draw.chunks, :2]] or [np.zeros(0)]
        )
        assert np.array_equal(view.positions, expected)


@pytest.mark.parametrize("cross", [True, False])
def test_nothing_masked_no_pass(cross: bool) -> None:
    item = example(cross)
    none = np.zeros((0, 2), np.int32)
    empty = dataclasses.replace(
        item,
        student_ids=item.student_ids[:2],
        spans=none,
        chunks=item.chunks[:0],
        offsets=item.offsets[:0],
    )
    view = teacher_view(empty, draw_for(empty, NoiseConfig(), 0))
    assert passes(view, MASK, True) == passes(view, MASK, False) == []
