"""Stores that lost something, or hold something else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shared.cache.ledger import settle_ledger
from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit
from shared.cache.stores import Store
from shared.system.errors import TideError
from tests.conftest import files

pytestmark = pytest.mark.faults("stores that lost something")
NAMES = ["draw=01/part-00001.parquet", "student_tokenizer/tokenizer.json", "teacher_tokenizer/tokenizer.json",
         "manifest.json", "ledger.parquet"]  # fmt: skip


@pytest.fixture
def pushed(caches: dict[str, Path], tmp_path: Path) -> tuple[Path, Store]:
    store = Store.open(str(tmp_path / "store"))
    push(store, caches["tiny-cross"])
    return caches["tiny-cross"], store


def push(store: Store, cache: Path) -> int:
    manifest = load_manifest(cache)
    return store.push(cache, manifest, settle_ledger(cache, manifest))


def damage(store: Store, name: str, how: str) -> None:
    path, marker = Path(store.root) / name, Path(store.root) / f"{name}.ok"
    match how:
        case "object lost":
            path.unlink()
        case "marker lost":
            marker.unlink()
        case "both lost":
            path.unlink()
            marker.unlink()
        case "marker empty":
            marker.write_bytes(b"")
        case "marker cut":
            marker.write_bytes(marker.read_bytes()[:20])
        case "marker of something else":
            marker.write_text('{"sha256": 3}')
        case "object cut":
            path.write_bytes(path.read_bytes()[:-7])
        case _:
            raise AssertionError(how)


def content(cache: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    paths = [path for path in cache.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in paths}


HOW = [
    "object lost",
    "marker lost",
    "both lost",
    "marker empty",
    "marker cut",
    "marker of something else",
    "object cut",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", HOW)
def test_what_is_lost_is_said_by_pull_and_mended_by_push(
    name: str, how: str, pushed: tuple[Path, Store], tmp_path: Path
) -> None:
    cache, store = pushed
    known = content(cache)
    damage(store, name, how)
    try:
        store.pull(tmp_path / "pulled")
    except TideError as error:
        said = str(error)
    else:  # what is lost could be done without, or be checked by the ledger
        said = (
            "push"
            if all(known[n] == c for n, c in content(tmp_path / "pulled").items())
            else "another content"
        )
    assert "push" in said or "copy it again" in said
    push(store, cache)
    store.pull(tmp_path / "again")
    assert files(tmp_path / "again") == files(cache)


def test_a_shard_whose_marker_was_cut_is_computed_again_by_no_one_but_written_again(
    pushed: tuple[Path, Store],
) -> None:
    cache, store = pushed
    damage(store, NAMES[0], "marker cut")
    assert Unit(1, 1) not in store.units()
    push(store, cache)
    assert Unit(1, 1) in store.units()


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "draw=00/readme.md", "draw=xx/part-00000.parquet", "draw=00/part-²²²²².parquet",
     "draw=00/part-00000.parquet.bak", "deep/draw=00/part-00000.parquet", "student_tokenizer/a/b.json", "tables/run.py",
     f"draw=00/part-{'9' * 120}.parquet", ".DS_Store", "draw=00/.part-00000.parquet"],
)  # fmt: skip
def test_files_of_others_in_the_store_are_left_alone(
    name: str, pushed: tuple[Path, Store], tmp_path: Path
) -> None:
    cache, store = pushed
    for suffix in ("", ".ok"):
        place = Path(store.root) / f"{name}{suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("{}")
    assert push(store, cache) == 6
    assert store.pull(tmp_path / "pulled") > 6
    assert files(tmp_path / "pulled") == files(cache)
    assert not (tmp_path / "pulled" / name).exists()
    store.bring(tmp_path / "brought")
    assert not (tmp_path / "brought" / name).exists()


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "draw=00/../../x", "run.py", "", ".", "tables/../x.parquet"]
)
def test_names_that_lead_elsewhere_are_refused(name: str, pushed: tuple[Path, Store]) -> None:
    _, store = pushed
    for action in (
        lambda: store.read(name),
        lambda: store.get(name),
        lambda: store.put(name, b"x"),
    ):
        with pytest.raises(TideError, match="no file of a cache"):
            action()


def test_a_local_store_is_written_whole_or_not_at_all(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full in the middle of a shard: nothing is there under its name."""
    from shared.system import atomic

    cache = Path(shutil.copytree(caches["tiny-cross"], tmp_path / "c"))
    store = Store.open(str(tmp_path / "store"))
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    name = atomic._temporary
    target = tmp_path / "store" / NAMES[0]
    monkeypatch.setattr(atomic, "_temporary", lambda path: full if path == target else name(path))
    with pytest.raises(TideError, match="disk is full"):
        push(store, cache)
    assert not target.exists()
    monkeypatch.undo()
    assert push(store, cache) == 6
