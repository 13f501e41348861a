from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shared.compact import LARGEST_ERROR, round_logp
from shared.errors import TideError
from shared.schema import CacheRow, from_table, to_table
from shared.shards import Unit, finished_units, read_shard, shard_counts, write_shard

T = (1.0, 2.0)


def make_row(seed: int, cross: bool, topk: bool, chunks: bool, masked: int) -> CacheRow:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 4, masked).astype(np.int32)
    kept, floats = int(sizes.sum()), rng.standard_normal
    return CacheRow(
        example_id=f"é{seed}",
        label=f"row {seed}",
        draw=seed % 3,
        t=float(np.float32(rng.random())),
        student_ids=rng.integers(0, 99, 8).astype(np.int32),
        spans=np.array([[1, 3], [5, 8]], np.int32),
        masked=np.arange(masked, dtype=np.int32),
        teacher_ids=np.arange(5, dtype=np.int32) if cross else None,
        teacher_masked=np.arange(masked, dtype=np.int32) if cross else None,
        split=rng.random(masked) < 0.5,
        gold_logit=floats(masked).astype(np.float32),
        logsumexp=floats((masked, 2)).astype(np.float32),
        topk_sizes=sizes if topk else None,
        topk_ids=rng.integers(0, 99, kept).astype(np.int32) if topk else None,
        topk_logits=floats(kept).astype(np.float32) if topk else None,
        chunk_student=rng.integers(0, 8, (2, 2)).astype(np.int32) if chunks else None,
        chunk_teacher=rng.integers(0, 8, (2, 2)).astype(np.int32) if chunks else None,
        chunk_logp=floats(2).astype(np.float32) if chunks else None,
    )


def assert_same(a: CacheRow, b: CacheRow) -> None:
    for name in CacheRow.__dataclass_fields__:
        x: Any = getattr(a, name)
        y: Any = getattr(b, name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype
            assert np.abs(x - y).max(initial=0.0) <= LARGEST_ERROR if name == "topk_logits" else np.array_equal(x, y)
        else:
            assert x == y, name


row_kinds = st.tuples(st.integers(0, 999), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 6))


@given(st.lists(row_kinds, max_size=5))
def test_a_table_gives_back_its_rows(kinds: list[tuple[int, bool, bool, bool, int]]) -> None:
    rows = [make_row(*kind) for kind in kinds]
    again = from_table(to_table(rows, T), T)
    assert len(again) == len(rows)
    for a, b in zip(rows, again, strict=True):
        assert_same(a, b)


def test_a_shard_gives_back_its_rows_and_plain_polars_reads_it(tmp_path: Path) -> None:
    rows = [dataclasses.replace(make_row(i, bool(i % 2), True, True, i % 5), draw=3) for i in range(600)]
    path = Unit(3, 14).path(tmp_path)
    write_shard(path, rows, T, {"examples": 600})
    for a, b in zip(rows, read_shard(path, T), strict=True):
        assert_same(a, b)
    assert shard_counts(path) == {"examples": 600, "rows": 600}
    assert finished_units(tmp_path) == [Unit(3, 14)]
    assert pl.read_parquet(path)["masked"][3].to_list() == rows[3].masked.tolist()


def test_the_same_rows_are_the_same_bytes(tmp_path: Path) -> None:
    rows = [make_row(i, True, True, True, 4) for i in range(9)]
    write_shard(tmp_path / "a.parquet", rows, T, {"b": 1, "a": 2})
    write_shard(tmp_path / "b.parquet", rows, T, {"a": 2, "b": 1})
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_a_damaged_shard_is_an_explained_error_wherever_it_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    write_shard(path, [make_row(i, True, True, True, 4) for i in range(50)], T, {})
    whole = path.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(TideError, match=r"cannot be read[\s\S]*delete this file"):
            read_shard(path, T)
    found = 0
    for place in range(4, len(whole) - 8, max(len(whole) // 40, 1)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x40]) + whole[place + 1 :])
        try:
            read_shard(path, T)
        except TideError:
            found += 1
    assert found >= 25  # flips in pages are caught by their checksums; some in the footer change nothing that is read


def test_a_parquet_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(TideError, match="other columns"):
        read_shard(tmp_path / "x.parquet", T)


@given(arrays(np.float32, st.integers(0, 40), elements=st.floats(-64, 0, width=32)))
def test_rounding_is_bounded_finest_near_certainty_and_happens_once(logp: np.ndarray) -> None:
    once = round_logp(logp)
    error = np.abs(once.astype(np.float32) - logp)
    assert error.max(initial=0.0) <= LARGEST_ERROR
    probability = np.exp(logp.astype(np.float64))
    assert np.all(np.abs(np.exp(once.astype(np.float64)) - probability) <= 0.0005 + 0.016 * probability * (logp < -4))
    assert np.array_equal(round_logp(once.astype(np.float32)), once)
    assert np.all(np.diff(round_logp(np.sort(logp)).astype(np.float32)) >= 0)
