import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shared.cache import levels
from shared.cache.ledger import Entry
from shared.cache.row import CacheRow, Layout
from shared.cache.shards import Unit, finished_units, read_table, write_shard
from shared.system.files import TideError
from tests.reading import random_tables, read_shard

T = (1.0, 2.0)
RANK = 3
TABLES = random_tables(99, 4, RANK, temperatures=2)
LEVELS, EXACT = Layout(T, "levels", TABLES), Layout(T, "float32", TABLES)


def test_the_hottest_temperature_that_settings_allow_has_levels() -> None:
    """They are kept as differences, in 16 bits."""
    assert levels.to_levels(np.zeros(1, np.float32), (500.0,)).max() < 2**16


def make_row(seed: int, cross: bool, topk: bool, chunks: bool, masked: int) -> CacheRow:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, masked).astype(np.int32)
    logp = [np.sort(np.log(rng.dirichlet(np.ones(n + 1))[:n]))[::-1] for n in sizes]
    floats = rng.standard_normal
    values: dict[str, Any] = {
        "example_id": f"é{seed}", "label": f"row {seed}", "draw": seed % 3,
        "t": float(np.float32(rng.random())),
        "student_ids": rng.integers(0, 99, 8).astype(np.int32),
        "spans": np.array([[1, 3], [5, 8]], np.int32),
        "masked": np.arange(masked, dtype=np.int32), "split": rng.random(masked) < 0.5,
        "gold_logp": -rng.exponential(3, masked).astype(np.float32),
        "logsumexp": floats(masked).astype(np.float32),
    }  # fmt: skip
    if cross:
        values["teacher_ids"] = np.arange(5, dtype=np.int32)
        values["teacher_masked"] = np.arange(masked, dtype=np.int32)
    if topk:
        ids = rng.integers(0, 99, int(sizes.sum())).astype(np.int32)
        values |= {"topk_sizes": sizes, "topk_ids": ids}
        values["topk_logp"] = np.concatenate([*logp, np.zeros(0)]).astype(np.float32)
        values["tail_level"] = floats((masked, 2)).astype(np.float32)
        values["tail_code"] = rng.integers(-127, 128, (masked, RANK)).astype(np.float32)
    if chunks:
        for name in ("chunk_student", "chunk_teacher"):
            values[name] = rng.integers(0, 8, (2, 2)).astype(np.int32)
        values["chunk_logp"] = floats(2).astype(np.float32)
    return CacheRow(**{"teacher_ids": None, "teacher_masked": None, **values})


STEPS = {"gold_logp": levels.GOLD_STEPS, "logsumexp": levels.LOGIT_STEPS}
STEPS["tail_level"] = levels.TAIL_STEPS


def assert_same(a: CacheRow, b: CacheRow, exact: bool) -> None:
    for name in CacheRow.__dataclass_fields__:
        x, y = getattr(a, name), getattr(b, name)
        if not isinstance(x, np.ndarray):
            assert x == y, name
        elif exact or name not in (*STEPS, "topk_logp"):
            assert x.dtype == y.dtype or name == "tail_code"  # a byte each
            assert np.array_equal(x, y), name
        else:
            bound = levels.half_steps(x, T) if name == "topk_logp" else 0.5 / STEPS[name]
            assert (np.abs(x - y) <= bound + 1e-5).all(), name


flag = st.booleans()
one_row = st.builds(make_row, st.integers(0, 999), flag, flag, flag, st.integers(0, 6))


@pytest.mark.parametrize("layout", [LEVELS, EXACT], ids=["levels", "float32"])
@given(st.lists(one_row, max_size=5))
def test_a_table_gives_back_its_rows(layout: Layout, rows: list[CacheRow]) -> None:
    with_topk = [row for row in rows if row.topk_ids is not None]
    rows = with_topk or rows  # a cache has it or has not
    again = levels.from_table(levels.to_table(rows, layout), layout)
    assert len(again) == len(rows)
    for a, b in zip(rows, again, strict=True):
        assert_same(a, b, layout.values == "float32")
    assert levels.to_table(again, layout).equals(
        levels.to_table(rows, layout)
    )  # rounded once is rounded


def test_a_shard_gives_back_its_rows_and_plain_polars_reads_it(tmp_path: Path) -> None:
    made = [make_row(i, bool(i % 2), True, True, i % 5) for i in range(600)]
    rows = [dataclasses.replace(row, draw=3) for row in made]
    path = Unit(3, 14).path(tmp_path)
    content = write_shard(path, rows, LEVELS, {"examples": 600, "draw": 3, "part": 14})
    assert path.read_bytes() == content
    for a, b in zip(rows, read_shard(path, LEVELS), strict=True):
        assert_same(a, b, exact=False)
    counts = read_table(path, LEVELS).counts
    assert counts == {"examples": 600, "rows": 600, "draw": 3, "part": 14}
    assert Entry.of(content, counts).rows == 600
    again = {"part": 14, "draw": 3, "examples": 600}
    assert write_shard(tmp_path / "same.parquet", rows, LEVELS, again) == content
    assert finished_units(tmp_path) == [Unit(3, 14)]
    assert (
        pl.read_parquet(path, columns=["masked"])["masked"][3].to_list() == rows[3].masked.tolist()
    )


@pytest.mark.parametrize("odd", ["8", 1.0, True, -1, 1 << 63, None])
def test_counts_that_are_none_are_refused(odd: Any, tmp_path: Path) -> None:
    path = tmp_path / "part-00000.parquet"
    write_shard(path, [], LEVELS, {"rows_without_chunks": 0})
    assert read_table(path, LEVELS).counts["rows_without_chunks"] == 0
    write_shard(path, [], LEVELS, {"rows_without_chunks": odd})
    with pytest.raises(TideError):
        read_table(path, LEVELS)


def test_other_columns_and_another_name_are_refused(tmp_path: Path) -> None:
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(TideError):
        read_shard(tmp_path / "x.parquet", LEVELS)
    path = Unit(0, 1).path(tmp_path)
    write_shard(path, [make_row(0, True, True, True, 4)], LEVELS, {"draw": 0, "part": 0})
    with pytest.raises(TideError):
        read_table(path, LEVELS)


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 2.0), (1.0, 5.0)])
@given(arrays(np.float32, st.integers(0, 40), elements=st.floats(-20, 0, width=32)))
def test_levels_are_bounded_finest_near_certainty_and_taken_once(
    temperatures: tuple[float, ...], logp: np.ndarray
) -> None:
    stored = levels.to_levels(logp, temperatures)
    back = levels.level_table(temperatures)[stored]
    inside = logp > -16  # below lies the lowest level of the coarsest of these
    assert (
        np.abs(back - logp)[inside] <= levels.half_steps(logp, temperatures)[inside] + 1e-4
    ).all()
    assert np.array_equal(levels.to_levels(back, temperatures), stored)
    assert np.all(np.diff(levels.to_levels(np.sort(logp), temperatures)) >= 0)
