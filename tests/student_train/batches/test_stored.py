"""Training from a store: shards come ahead of their use, and a bounded number of them stays."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest

from shared.cache.ledger import LEDGER, settle_ledger
from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit, finished_units
from shared.cache.stores import Store
from shared.settings.config import TrainConfig
from shared.system.errors import TideError
from student_train.batches.loader import BatchDataset
from student_train.batches.open_cache import OpenCache, open_cache
from tests.reading import dataset


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
    fetch = OpenCache._fetch
    monkeypatch.setattr(
        OpenCache, "_fetch", lambda self, unit: (names.append(str(unit)), fetch(self, unit))[1]
    )
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
    again = pickle.loads(pickle.dumps(opened(store, tmp_path / "local")))  # to a loader's process
    path = Unit(0, 1).path(tmp_path / "local")
    path.write_bytes(path.read_bytes()[:-3])
    fetched.clear()
    assert again.shard(Unit(0, 0)).counts["rows"] == again.ledger[Unit(0, 0)].rows
    assert fetched == []
    assert again.shard(Unit(0, 1)).counts["rows"] == again.ledger[Unit(0, 1)].rows
    assert len(fetched) == 1


def test_another_shard_a_missing_one_and_no_ledger_are_refused(store: str, tmp_path: Path) -> None:
    source = opened(store, tmp_path / "local")
    first = Unit(0, 0).path(Path(store))
    shutil.copyfile(first, Unit(1, 2).path(Path(store)))
    with pytest.raises(TideError, match="part-00002"):
        source.shard(Unit(1, 2))
    first.unlink()
    with pytest.raises(TideError, match="part-00000"):
        source.shard(Unit(0, 0))
    (Path(store) / LEDGER).unlink()
    with pytest.raises(TideError, match=LEDGER):
        opened(store, tmp_path / "other")
