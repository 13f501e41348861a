"""One file says what every shard is; what a killed process did not note is found again."""

import contextlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from shared.cache import ledger as ledgers
from shared.cache.ledger import LEDGER, Entry, load_ledger, settle_ledger, whole_ledger
from shared.cache.manifest import checksum_of, load_manifest
from shared.cache.shards import Unit, finished_units, read_table
from shared.system.files import TideError
from teacher_cache.maintenance.inspect import inspect_cache
from teacher_cache.maintenance.verify import check_cache, delete_damaged
from teacher_cache.run.progress import read_status
from tests.conftest import files
from tests.reading import all_rows, dataset


def settled(cache: Path) -> ledgers.Ledger:
    return settle_ledger(cache, load_manifest(cache))


@pytest.fixture
def cache(caches: dict[str, Path], tmp_path: Path) -> Path:
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


def test_training_begins_with_the_ledger_and_the_tables_alone(
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
    tables = {f"{name}.parquet" for name in ("vocabulary", "encoder", "map", "bytes")}
    assert opened == tables | {"ledger.parquet"}


def test_a_shard_that_nobody_noted_is_read(caches: dict[str, Path], cache: Path) -> None:
    """Killed between the shard's rename and the note."""
    manifest = load_manifest(cache)
    whole = load_ledger(cache, manifest)
    ledgers.save_ledger(cache, manifest, {unit: whole[unit] for unit in list(whole)[:4]})
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
        ledgers.note(cache, Unit(0, 0), entry)
    (notes,) = (cache / "ledger").glob("*.jsonl")
    with notes.open("a") as handle:
        handle.write('{"draw": 0, "part": 1, "at": 9e9, "sha')
    assert load_ledger(cache, load_manifest(cache)) == {Unit(0, 0): second}


def test_a_ledger_or_a_shard_that_is_another_one_is_refused(
    caches: dict[str, Path], cache: Path
) -> None:
    """Also where the ledger is made anew: the shard itself says which part it is."""
    whole = (cache / LEDGER).read_bytes()
    for content in ((caches["tiny-shared"] / LEDGER).read_bytes(), b"PAR1 no"):
        (cache / LEDGER).write_bytes(content)
        with pytest.raises(TideError, match=LEDGER):
            whole_ledger(cache, load_manifest(cache))
    (cache / LEDGER).write_bytes(whole)
    shutil.copyfile(Unit(0, 0).path(cache), Unit(0, 1).path(cache))
    for _ in range(2):
        with pytest.raises(TideError, match="part-00001"):
            dataset(cache)
        (cache / LEDGER).unlink(missing_ok=True)


LINE = {"draw": 0, "part": 1, "at": 9e9, **vars(Entry("a" * 64, 1, 2, 3, 4, 5))}
STRANGE: list[Any] = [5, None, "x", [[1, 2]], {**LINE, "rows": "many"}, {**LINE, "part": None},
    {**LINE, "at": []}, {}]  # fmt: skip


def test_notes_that_are_none(cache: Path) -> None:
    whole = load_ledger(cache, load_manifest(cache))
    (cache / "ledger").mkdir(exist_ok=True)
    lines = [json.dumps(line).encode() for line in STRANGE] + [b"\xff\xfe", b"[" * 100_000]
    (cache / "ledger" / "x.jsonl").write_bytes(b"\n".join(lines))
    assert load_ledger(cache, load_manifest(cache)) == whole


@pytest.mark.parametrize("name", ["bytes", "rows", "masked", "chunks", "rows_without_chunks"])
@pytest.mark.parametrize("noted", [True, False])
def test_counts_that_do_not_hold_are_found(
    name: str, noted: bool, caches: dict[str, Path], cache: Path
) -> None:
    """In the ledger or in a note; then they are made anew, and no shard is touched."""
    manifest = load_manifest(cache)
    ledger = load_ledger(cache, manifest)
    ledger[Unit(1, 1)] = replace(
        ledger[Unit(1, 1)], **{name: getattr(ledger[Unit(1, 1)], name) + 3}
    )
    if noted:
        ledgers.note(cache, Unit(1, 1), ledger[Unit(1, 1)])
    else:
        ledgers.save_ledger(cache, manifest, ledger)
    with pytest.raises(TideError, match="part-00001"):
        dataset(cache)
    report = check_cache(cache)
    assert len(report.problems) == 1 and delete_damaged(report) == 1
    assert not check_cache(cache).problems
    assert files(cache) == files(caches["tiny-cross"])


@pytest.mark.parametrize("name", [LEDGER, "checked.json", "ledger/x.jsonl", "manifest.json",
    "tables/encoder.parquet", "shards/draw=01/part-00001.parquet", "status.json"])  # fmt: skip
def test_a_pipe_in_the_place_of_a_file_is_no_end_of_waiting(name: str, cache: Path) -> None:
    (cache / name).unlink(missing_ok=True)
    (cache / name).parent.mkdir(exist_ok=True)
    os.mkfifo(cache / name)
    for use in (dataset, check_cache, settled, inspect_cache, read_status):
        with contextlib.suppress(TideError):
            use(cache)


ABSENT = object()
HOSTILE: list[tuple[str, Any]] = [
    ("parts", 10**12), ("parts", -1), ("parts", "3"), ("draws", 101), ("draws", True),
    ("examples", None), ("schema_version", 3), ("fingerprint", []), ("fingerprint.tables", 3),
    ("fingerprint.targets.k", ABSENT), ("fingerprint.targets.temperatures", [float("nan")]),
    ("fingerprint.targets.temperatures", [1.0] * 10**5), ("fingerprint.targets.values", "pickle"),
    ("fingerprint.targets.partial", "yes"), ("fingerprint.lengths.block", 0),
    ("fingerprint.student.mask_id", 10**12), ("fingerprint.student.tokenizer", "x" * 10**6),
    ("fingerprint.teacher.attention", "full"), ("fingerprint.noise.demo_ratio", 7.0),
]  # fmt: skip


def test_manifests_that_cannot_be(caches: dict[str, Path], tmp_path: Path) -> None:
    """Each with a checksum that holds."""
    for place, value in HOSTILE:
        values = load_manifest(caches["tiny-shared"]).to_json()
        *sections, name = place.split(".")
        inner: Any = values
        for section in sections:
            inner = inner[section]
        inner[name] = value
        if value is ABSENT:
            del inner[name]
        text = json.dumps({**values, "checksum": checksum_of(values)})
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(TideError):
            load_manifest(tmp_path)


def test_manifests_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    odd = [os.mkfifo, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to(p.name)]
    texts = (b"", b"null", b"[1]", b'{"draws": 1}', b"\xed\xa0\x80", b'{"a":' * 200_000)
    for make in (*odd, *(lambda p, text=text: p.write_bytes(text) for text in texts)):
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(TideError):
            load_manifest(tmp_path)
