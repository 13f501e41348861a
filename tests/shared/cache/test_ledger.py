"""One file that says what every shard is; what a killed process did not note is found again."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from shared.cache.ledger import (
    LEDGER,
    Entry,
    load_ledger,
    note,
    save_ledger,
    settle_ledger,
    whole_ledger,
)
from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit, finished_units, read_table
from shared.system.errors import TideError
from teacher_cache.run.build import build_cache
from tests.conftest import files, small_cache_config
from tests.reading import all_rows, dataset


@pytest.fixture
def cache(caches: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(caches["tiny-cross"], tmp_path / "c"))


def test_the_ledger_says_what_the_shards_hold(caches: dict[str, Path]) -> None:
    cache = caches["tiny-cross"]
    manifest = load_manifest(cache)
    ledger = load_ledger(cache, manifest)
    assert sorted(ledger) == finished_units(cache) == manifest.units()
    for unit, entry in ledger.items():
        content = unit.path(cache).read_bytes()
        assert entry == Entry.of(content, read_table(unit.path(cache)).counts)
        entry.check(unit.path(cache), content)
    rows = all_rows(cache)
    assert sum(entry.rows for entry in ledger.values()) == len(rows)
    assert sum(entry.masked for entry in ledger.values()) == sum(row.masked.size for row in rows)
    assert not list((cache / "ledger").glob("*"))


def test_training_reads_one_file_to_begin_with(
    caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = caches["tiny-cross"]
    dataset(cache)  # what was never looked at is looked at once
    opened, plain = set(), pq.ParquetFile

    def noted(source: Path, **options: Any) -> pq.ParquetFile:
        opened.add(Path(source).name)
        return plain(source, **options)

    monkeypatch.setattr(pq, "ParquetFile", noted)
    assert len(dataset(cache, batch_size=24, epochs=2.0)) == 2
    assert opened == {"vocabulary.parquet", "ledger.parquet"}


def test_a_shard_that_nobody_noted_is_read(caches: dict[str, Path], cache: Path) -> None:
    """Killed between the shard's rename and the note."""
    manifest = load_manifest(cache)
    whole = load_ledger(cache, manifest)
    save_ledger(cache, manifest, {unit: whole[unit] for unit in list(whole)[:4]})
    assert settle_ledger(cache, manifest) == whole
    assert files(cache) == files(caches["tiny-cross"])
    (cache / LEDGER).unlink()
    assert whole_ledger(cache, manifest) == whole
    Unit(1, 1).path(cache).unlink()
    (cache / LEDGER).unlink()
    with pytest.raises(TideError):
        whole_ledger(cache, manifest)
    assert not (cache / LEDGER).exists()  # not whole: no ledger that says so


def test_the_newest_note_counts_and_a_torn_line_does_not(cache: Path) -> None:
    (cache / LEDGER).unlink()
    first, second = (Entry(text * 64, 1, 2, 3, 4, 5) for text in "ab")
    for entry in (first, second):
        note(cache, Unit(0, 0), entry)
    (notes,) = (cache / "ledger").glob("*.jsonl")
    with notes.open("a") as handle:
        handle.write('{"draw": 0, "part": 1, "at": 9e9, "sha')
    assert load_ledger(cache, load_manifest(cache)) == {Unit(0, 0): second}


def test_a_ledger_that_is_damaged_or_of_another_cache(caches: dict[str, Path], cache: Path) -> None:
    for content in ((caches["tiny-shared"] / LEDGER).read_bytes(), b"PAR1 no"):
        (cache / LEDGER).write_bytes(content)
        with pytest.raises(TideError, match=LEDGER):
            whole_ledger(cache, load_manifest(cache))


def test_a_shard_over_another_parts_name_is_neither_verified_nor_trained_on(cache: Path) -> None:
    """Also where the ledger is made anew: the shard itself says which part it is."""
    shutil.copyfile(Unit(0, 0).path(cache), Unit(0, 1).path(cache))
    for _ in range(2):
        with pytest.raises(TideError, match="part-00001"):
            dataset(cache)
        (cache / LEDGER).unlink(missing_ok=True)


def test_a_cache_that_grows_keeps_its_ledger(random_teacher: Path, cache: Path) -> None:
    before = load_ledger(cache, load_manifest(cache))
    build_cache(small_cache_config("tiny-cross", random_teacher, cache, noise={"draws": 3}))
    after = load_ledger(cache, load_manifest(cache))
    assert len(after) == 9 and {unit: after[unit] for unit in before} == before
