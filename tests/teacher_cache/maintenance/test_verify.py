import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shared.cache.shards import finished_units
from shared.system.errors import TideError
from teacher_cache.maintenance.inspect import describe, inspect_cache
from teacher_cache.maintenance.verify import verify_cache
from tests.conftest import TEACHER_TOKENIZER, small_cache_config
from tests.reading import change_column, plain_table, same_values


@pytest.mark.parametrize("teacher", ["tiny-cross", "tiny-shared"])
def test_a_cache_verifies_against_its_own_engine(
    caches: dict[str, Path], random_teacher: Path, teacher: str
) -> None:
    """Other rows share the batches, so values move by rounding and no more."""
    report = verify_cache(small_cache_config(teacher, random_teacher, caches[teacher]), 20)
    assert report.rows == 20
    assert report.positions > 200
    names = {"log p of gold", "logsumexp", "top-k log p", "tail log-odds", "√ class mass"}
    assert set(report.deviations) == names
    assert report.largest < 2e-5
    assert "20 rows" in report.in_words()


def test_a_changed_value_is_found(
    caches: dict[str, Path], random_teacher: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(caches["tiny-shared"], tmp_path / "c"))
    for unit in finished_units(cache):
        column = plain_table(unit.path(cache)).column("gold_logp_q").combine_chunks()
        change_column(
            cache,
            unit,
            "gold_logp_q",
            same_values(column, pa.array(np.asarray(column.values) + 256)),
        )
    report = verify_cache(small_cache_config("tiny-shared", random_teacher, cache), 200)
    assert report.deviations["log p of gold"].mean() == pytest.approx(0.5, abs=2e-3)
    assert report.deviations["logsumexp"].max() < 1e-5


def test_what_does_not_belong_together_is_refused(
    caches: dict[str, Path], random_teacher: Path
) -> None:
    def verify(rows: int = 5, teacher: Path = random_teacher, **changes: Any) -> None:
        verify_cache(
            small_cache_config("tiny-shared", teacher, caches["tiny-shared"], **changes), rows
        )

    with pytest.raises(TideError, match="--rows is 0"):
        verify(0)
    with pytest.raises(TideError, match=r"teacher.weights"):
        verify(teacher=TEACHER_TOKENIZER)
    with pytest.raises(TideError, match=r"targets.k"):
        verify(targets={"k": 4, "classes": 5, "pilot": 200})
    with pytest.raises(TideError, match="is no cache"):
        verify_cache(small_cache_config("tiny-shared", random_teacher, random_teacher), 5)


def test_inspection_adds_up(caches: dict[str, Path]) -> None:
    for teacher in ("tiny-cross", "tiny-shared"):
        found = inspect_cache(caches[teacher])
        assert len(found.units) == 6
        assert found.rows == 48
        assert found.masked == found.masked_by_t.sum() > 0
        assert found.chunks == found.likelihoods.sum() == sum(found.chunk_tokens.values()) > 0
        assert (found.mass >= 0).all() and (found.mass <= 1.0001 * found.positions).all()
        size = sum(unit.path(caches[teacher]).stat().st_size for unit in found.units)
        assert 0.3 * size < sum(found.bytes_by_column.values()) < size  # the rest is metadata
        text = describe(found)
        assert f"{found.masked:,} masked positions" in text
    assert set(inspect_cache(caches["tiny-shared"]).chunk_tokens) == {(1, 1)}
