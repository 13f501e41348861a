"""Training from a store: shards come as they are needed, ahead of their use, and a bounded number of them stays."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from shared.cache.ledger import LEDGER, settle_ledger
from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit, finished_units
from shared.cache.stores import Store
from shared.settings.config import TrainConfig
from shared.system.errors import TideError
from student_train.batches.loader import BatchDataset
from student_train.batches.open_cache import OpenCache, open_cache
from student_train.training.trainer import train_student
from teacher_cache.run.build import build_cache
from tests.conftest import small_cache_config
from tests.reading import dataset
from tests.student_train.training.test_trainer import config, curve


@pytest.fixture
def store(caches: dict[str, Path], tmp_path: Path) -> str:
    """A store with a finished cache, under an address that is a path."""
    cache, there = caches["tiny-shared"], tmp_path / "store"
    manifest = load_manifest(cache)
    Store.open(str(there)).push(cache, manifest, settle_ledger(cache, manifest))
    return str(there)


SETTINGS: dict = {"batch_size": 5, "seed": 3, "epochs": 4.0, "window": 2}


def opened(store: str, folder: Path, gigabytes: float = 1.0) -> OpenCache:
    config = TrainConfig(cache=folder, store=store, store_cache_gb=gigabytes, **SETTINGS)
    return open_cache(config)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that came from the store."""
    names: list[str] = []
    read = Store.read

    def counted(self: Store, name: str, *args: Any) -> bytes:
        if name.startswith("draw="):
            names.append(name)
        return read(self, name, *args)

    monkeypatch.setattr(Store, "read", counted)
    return names


def test_rows_and_their_order_are_those_of_the_folder(
    caches: dict[str, Path], store: str, tmp_path: Path, fetched: list[str]
) -> None:
    cache = opened(store, tmp_path / "local")
    assert finished_units(tmp_path / "local") == []  # nothing is pulled before it is needed
    data = BatchDataset(cache, TrainConfig(**SETTINGS))
    expected = dataset(caches["tiny-shared"], window=2)
    assert len(data) == len(expected)
    for i in range(len(data)):
        assert [r.example_id for r in data.rows(i)] == [r.example_id for r in expected.rows(i)]
    assert len(fetched) == 6  # each once, in four epochs


def test_a_bounded_folder_fetches_again(store: str, tmp_path: Path, fetched: list[str]) -> None:
    data = BatchDataset(opened(store, tmp_path / "local", 1e-6), TrainConfig(**SETTINGS))
    for i in range(len(data)):
        assert data.rows(i)
        assert len(finished_units(tmp_path / "local")) <= 5  # those in use and those on their way
    assert len(fetched) > 6


def test_what_is_there_already_is_not_fetched_and_what_is_damaged_is(
    store: str, tmp_path: Path, fetched: list[str]
) -> None:
    cache = opened(store, tmp_path / "local")
    for part in range(3):
        cache.shard(Unit(0, part))
    again = opened(store, tmp_path / "local")
    path = Unit(0, 1).path(tmp_path / "local")
    path.write_bytes(path.read_bytes()[:-3])
    fetched.clear()
    assert again.shard(Unit(0, 0)).counts["rows"] == again.ledger[Unit(0, 0)].rows
    assert fetched == []
    assert again.shard(Unit(0, 1)).counts["rows"] == again.ledger[Unit(0, 1)].rows
    assert len(fetched) == 1


def test_a_shard_that_is_not_the_ledgers_is_refused(store: str, tmp_path: Path) -> None:
    source = opened(store, tmp_path / "local")
    shutil.copyfile(
        Path(store) / "draw=00" / "part-00000.parquet",
        Path(store) / "draw=01" / "part-00002.parquet",
    )
    with pytest.raises(TideError, match="not what the cache's ledger says"):
        source.shard(Unit(1, 2))
    (Path(store) / "draw=01" / "part-00001.parquet").unlink()
    with pytest.raises(TideError, match="part-00001.parquet"):
        source.shard(Unit(1, 1))


def test_a_store_without_a_finished_cache(store: str, tmp_path: Path) -> None:
    (Path(store) / LEDGER).unlink()
    with pytest.raises(TideError, match="ledger.parquet"):
        opened(store, tmp_path / "local")
    with pytest.raises(TideError, match=r"is no cache: it has no manifest"):
        opened(str(tmp_path / "nothing"), tmp_path / "local")


def test_it_goes_to_other_processes(store: str, tmp_path: Path) -> None:
    source = opened(store, tmp_path / "local")
    source.soon([Unit(0, 0)])
    assert pickle.loads(pickle.dumps(source)).shard(Unit(0, 1)).counts["rows"] > 0


def test_a_student_learns_the_same_from_a_store(
    caches: dict[str, Path], store: str, tmp_path: Path
) -> None:
    objective = {"type": "kl"}
    one = config(caches["tiny-shared"], tmp_path / "a", distillation=objective, max_steps=4)
    two = config(
        tmp_path / "local", tmp_path / "b", distillation=objective, max_steps=4, store=store
    )
    for settings in (one, two):
        train_student(settings)
    losses = [[e["loss"] for e in curve(tmp_path / name) if "loss" in e] for name in ("a", "b")]
    assert losses[0] == losses[1]


def test_a_store_that_has_grown_is_seen(
    caches: dict[str, Path], random_teacher: Path, store: str, tmp_path: Path
) -> None:
    before = opened(store, tmp_path / "local")
    grown = Path(shutil.copytree(caches["tiny-shared"], tmp_path / "grown"))
    build_cache(
        small_cache_config("tiny-shared", random_teacher, grown, noise={"draws": 3}, store=store)
    )
    after = opened(store, tmp_path / "local")
    assert (len(before.ledger), len(after.ledger)) == (6, 9)
    assert after.manifest.draws == 3
