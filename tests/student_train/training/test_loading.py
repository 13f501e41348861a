"""The loader's processes work ahead and change nothing; each trainer decodes the rows that it
trains on.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from shared.cache.shards import Shard, Unit
from shared.system.errors import TideError
from student_train.batches.loader import BatchDataset
from student_train.training.trainer import make_trainer, train_student
from tests.reading import dataset
from tests.student_train.training.test_trainer import config, curve


def test_a_process_that_works_ahead_changes_no_value(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    for workers in (0, 1):
        train_student(
            config(caches["tiny-shared"], tmp_path / str(workers), loader_workers=workers)
        )
    assert curve(tmp_path / "0") == curve(tmp_path / "1")


def test_what_a_process_of_the_loader_meets_is_said_without_a_traceback(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(caches["tiny-shared"], tmp_path / "c"))
    trainer, _ = make_trainer(config(cache, tmp_path / "r", loader_workers=1, heldout=None))
    for part in range(3):
        Unit(0, part).path(cache).unlink()
    with pytest.raises(TideError, match="shard") as caught:
        trainer.train_resuming()
    assert "Traceback" not in str(caught.value)


def test_a_process_decodes_its_own_rows_only(
    caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    rows = Shard.rows

    def counted(*args: Any) -> list:
        found = rows(*args)
        decoded.append(len(found))
        return found

    monkeypatch.setattr(Shard, "rows", counted)

    def epoch(data: BatchDataset, processes: int) -> int:
        decoded.clear()
        for i in range(data.batches_in(0)):
            data.rows(i * processes)
        return sum(decoded)

    one = epoch(dataset(caches["tiny-shared"], 1, batch_size=8), 1)
    four = epoch(dataset(caches["tiny-shared"], 4, batch_size=2), 4)
    assert (one, four) == (24, 6)
