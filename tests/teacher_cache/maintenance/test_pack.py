"""Archives: the cache comes back whole, or nothing is left of an archive that is odd."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from shared.cache.ledger import settle_ledger
from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit
from shared.cache.stores import Store
from shared.system.files import TideError
from shared.system.hardware import high_water
from teacher_cache.maintenance.derive import merge_caches, prune_cache
from teacher_cache.maintenance.pack import CHECKSUMS, pack_cache, unpack_cache
from tests.conftest import files

SHARD = "shards/draw=00/part-00000.parquet"


def archive_of(path: Path, note: Any, name: str, data: bytes, kind: bytes) -> None:
    """An archive with any note and any member."""
    content = note if isinstance(note, bytes) else json.dumps(note).encode()
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
        first, second = tarfile.TarInfo(CHECKSUMS), tarfile.TarInfo(name)
        first.size, second.size = len(content), len(data)
        second.type, second.linkname = kind, "/etc/passwd"
        tar.addfile(first, io.BytesIO(content))
        tar.addfile(second, io.BytesIO(data))
    path.write_bytes(zstandard.compress(plain.getvalue()))


def about(content: bytes, **changes: Any) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), **changes}


def refused(archive: Path, target: Path) -> None:
    """Nothing is left, and no memory was taken."""
    before, beside = high_water(), set(target.parent.iterdir())
    with pytest.raises(TideError):
        unpack_cache(archive, target)
    assert set(target.parent.iterdir()) == beside
    assert high_water() - before < 300 << 20


def test_pack_and_unpack_give_the_cache_back(caches: dict[str, Path], tmp_path: Path) -> None:
    archive = tmp_path / "c.tar.zst"
    pack_cache(caches["tiny-cross"], archive)
    once = archive.read_bytes()
    unpack_cache(archive, tmp_path / "again")
    assert files(tmp_path / "again") == files(caches["tiny-cross"])
    pack_cache(tmp_path / "again", archive)
    assert archive.read_bytes() == once
    for place in range(0, len(once), len(once) // 20):
        for damaged in (once[:place], once[:place] + bytes([once[place] ^ 4]) + once[place + 1 :]):
            archive.write_bytes(damaged)
            try:
                unpack_cache(archive, tmp_path / "bad")
            except TideError:
                assert not list(tmp_path.glob("bad*"))
            else:  # a flip in zstd's or tar's own header that changes nothing
                assert files(tmp_path / "bad") == files(caches["tiny-cross"])
                shutil.rmtree(tmp_path / "bad")


def pushed(cache: Path, target: Path) -> None:
    manifest = load_manifest(cache)
    Store.open(str(target)).push(cache, manifest, settle_ledger(cache, manifest))


WAYS: dict[str, Callable[[Path, Path], object]] = {
    "pack": pack_cache,
    "push": pushed,
    "pull": lambda cache, target: Store.open(str(cache)).pull(target),
    "prune": lambda cache, target: prune_cache(cache, target, draws=1),
    "cut": lambda cache, target: prune_cache(cache, target, k=2),
    "merge": lambda cache, target: merge_caches([cache, cache], target),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["student_tokenizer/notes.txt", "teacher_tokenizer", SHARD])
def test_nothing_that_lies_elsewhere_is_passed_on(
    way: str, name: str, caches: dict[str, Path], tmp_path: Path
) -> None:
    """By a link in the folder. The folder itself may be reached by one, and link inside itself."""
    cache = Path(shutil.copytree(caches["tiny-cross"], tmp_path / "real"))
    (tmp_path / "cache").symlink_to(cache)
    (cache / "student_tokenizer" / "inside.txt").symlink_to(cache / "manifest.json")
    WAYS[way](tmp_path / "cache", tmp_path / "good")
    (tmp_path / "private").mkdir()
    shutil.copyfile(Unit(0, 0).path(cache), key := tmp_path / "private" / "id_rsa")
    if (cache / name).is_dir():
        shutil.rmtree(cache / name)
    (cache / name).unlink(missing_ok=True)
    (cache / name).symlink_to(key.parent if "." not in name else key)
    with pytest.raises(TideError, match=r"id_rsa|lacks"):  # a store lists no linked folder
        WAYS[way](cache, tmp_path / "bad")


def test_notes_and_names_that_do_not_hold(tmp_path: Path) -> None:
    notes: list[Any] = [b"{", b"[" * 100_000, [], {SHARD: None}, {SHARD: about(b"x", bytes="1")}]
    notes += [{SHARD: about(b"x", bytes=size)} for size in (-1, 0, 10, 1 << 60)]
    notes += [{SHARD: about(b"x", sha256="zz")}, {SHARD: about(b"y")}, {}]
    names = ("../x", "/tmp/x", "shards/draw=00/../../x", "./manifest.json", "tables/x.py", "")
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
    cases = [(note, SHARD, b"x", tarfile.REGTYPE) for note in notes]
    cases += [({name: about(b"x")}, name, b"x", tarfile.REGTYPE) for name in names]
    cases += [({SHARD: about(b"")}, SHARD, b"", kind) for kind in kinds]
    for case in cases:
        archive_of(tmp_path / "a.tar.zst", *case)
        refused(tmp_path / "a.tar.zst", tmp_path / "cache")


@pytest.mark.parametrize("what", ["content", "header", "end"])
def test_small_archives_that_grow(what: str, tmp_path: Path) -> None:
    """Some hundred kilobytes that would be gigabytes in memory or on disk."""
    path = tmp_path / "a.tar.zst"
    zeros, many = bytes(1 << 20), 3000
    info = tarfile.TarInfo(SHARD)
    with path.open("wb") as raw, zstandard.ZstdCompressor(level=3).stream_writer(raw) as packed:
        if what == "header":
            info.type, info.name = b"x", "pax"
        else:
            claimed = 10 if what == "content" else len(zeros)
            note = json.dumps({SHARD: about(zeros, bytes=claimed)}).encode()
            first = tarfile.TarInfo(CHECKSUMS)
            first.size = len(note)
            packed.write(first.tobuf() + note + bytes(-len(note) % 512))
        info.size = len(zeros) if what == "end" else many * len(zeros)
        packed.write(info.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(many):
            packed.write(zeros)
    refused(path, tmp_path / "cache")


def test_taken_targets_and_odd_archives(caches: dict[str, Path], tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.zst"
    pack_cache(caches["tiny-cross"], archive)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    for target in ("file", "full", "link"):
        refused(archive, tmp_path / target)
    for source in ("fifo", "device", "full", "none"):
        refused(tmp_path / source, tmp_path / "cache")
    with contextlib.chdir(tmp_path / "empty"):
        refused(archive, Path("."))
    assert (tmp_path / "file").read_text() == "mine"
    assert unpack_cache(archive, tmp_path / "empty") > 6
