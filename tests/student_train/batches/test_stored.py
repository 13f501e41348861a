"""Training from a store: shards come ahead of their use, and a bounded number of them stays."""

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
from student_train.batches.loader import BatchDataset, OpenCache
from tests.reading import dataset

SETTINGS: dict = {"batch_size": 5, "seed": 3, "epochs": 4.0, "window": 2}


@pytest.fixture
def store(caches: dict[str, Path], tmp_path: Path) -> str:
    """A store with a finished cache, under an address that is a path."""
    cache, there = caches["tiny-shared"], tmp_path / "store"
    manifest = load_manifest(cache)
    Store.open(str(there)).push(cache, manifest, settle_ledger(cache, manifest))
    return str(there)


def opened(store: str, folder: Path, gigabytes: float = 1.0) -> OpenCache:
    how = {"store": store, "store_cache_gb": gigabytes, **SETTINGS}
    return OpenCache(TrainConfig(cache=folder, **how))


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that came from the store."""
    names: list[str] = []
    read = Store.read

    def noted(self: Store, name: str) -> bytes:
        names.extend([name] if name.endswith(".parquet") and "part-" in name else [])
        return read(self, name)

    monkeypatch.setattr(Store, "read", noted)
    return names


def test_rows_and_their_order_are_those_of_the_folder(
    caches: dict[str, Path], store: str, tmp_path: Path, fetched: list[str]
) -> None:
    local = tmp_path / "local"
    data = BatchDataset(opened(store, local), TrainConfig(**SETTINGS))
    assert finished_units(local) == []  # nothing is pulled before it is needed
    expected = dataset(caches["tiny-shared"], window=2)
    assert len(data) == len(expected)
    for i in range(len(data)):
        assert [r.example_id for r in data.rows(i)] == [r.example_id for r in expected.rows(i)]
    assert len(fetched) == 6  # each once, in four epochs
    bounded = BatchDataset(opened(store, tmp_path / "small", 1e-6), TrainConfig(**SETTINGS))
    fetched.clear()
    for i in range(len(bounded)):
        assert bounded.rows(i)
        assert len(finished_units(tmp_path / "small")) <= 5  # those in use, and on their way
    assert len(fetched) > 6


def test_what_is_there_already_is_not_fetched_and_what_is_damaged_is(
    store: str, tmp_path: Path, fetched: list[str]
) -> None:
    local = tmp_path / "local"
    cache = opened(store, local)
    for part in range(3):
        cache.shard(Unit(0, part))
    again = pickle.loads(pickle.dumps(opened(store, local)))  # to a loader's process
    path = Unit(0, 1).path(local)
    path.write_bytes(path.read_bytes()[:-3])
    fetched.clear()
    for part, fetches in ((0, 0), (1, 1)):
        unit = Unit(0, part)
        assert again.shard(unit).counts["rows"] == again.ledger[unit].rows
        assert len(fetched) == fetches


def test_another_shard_a_missing_one_and_no_ledger_are_refused(store: str, tmp_path: Path) -> None:
    source = opened(store, tmp_path / "local")
    first = Unit(0, 0).path(Path(store))
    shutil.copyfile(first, Unit(1, 2).path(Path(store)))
    first.unlink()
    for unit in (Unit(1, 2), Unit(0, 0)):
        with pytest.raises(TideError, match=f"part-0000{unit.part}"):
            source.shard(unit)
    (Path(store) / LEDGER).unlink()
    with pytest.raises(TideError, match=LEDGER):
        opened(store, tmp_path / "other")
