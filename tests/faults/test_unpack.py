from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import zstandard

from shared.system.errors import TideError
from shared.system.hardware import largest_process
from teacher_cache.maintenance.pack import CHECKSUMS, pack_cache
from teacher_cache.maintenance.unpack import unpack_cache

pytestmark = pytest.mark.faults("archives")
SHARD = "draw=00/part-00000.parquet"


def write(
    path: Path,
    note: Any,
    members: dict[str, bytes],
    kind: bytes = tarfile.REGTYPE,
    first: str = CHECKSUMS,
) -> Path:
    """An archive with any note and any members."""
    content = note if isinstance(note, bytes) else json.dumps(note).encode()
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in {CHECKSUMS: content, **members}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name != CHECKSUMS:
                info.type = kind
                info.linkname = "/etc/passwd"
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(zstandard.compress(plain.getvalue()))
    return path


def about(content: bytes, **changes: Any) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), **changes}


NOTES: dict[str, Any] = {
    "no JSON": b"{", "a list": [], "a number": 3, "null": None, "a name without facts": {SHARD: None},
    "a size that is a text": {SHARD: about(b"x", bytes="1")}, "a size below zero": {SHARD: about(b"x", bytes=-1)},
    "a size that is true": {SHARD: about(b"x", bytes=True)}, "no size": {SHARD: {"sha256": "0" * 64}},
    "a hash that is none": {SHARD: about(b"x", sha256="zz")}, "no hash": {SHARD: {"bytes": 1}},
    "a smaller size": {SHARD: about(b"x", bytes=0)}, "a larger size": {SHARD: about(b"x", bytes=10)},
    "a size beyond any disk": {SHARD: about(b"x", bytes=1 << 60)}, "nested without end": b"[" * 100_000,
}  # fmt: skip
NAMES = ["../x", "/tmp/x", "draw=00/../../x", "x", "manifest.json/", "./manifest.json", ".lock",
         "draw=00/x.parquet", "student_tokenizer/../x", "student_tokenizer/a/b", "tables/x.py",
         "draw=00/.part-00000.parquet", ""]  # fmt: skip


def refused(archive: Path, target: Path, match: str = "") -> None:
    """Refused with an explanation; nothing is left, and no memory was taken."""
    before, beside = largest_process(), set(target.parent.iterdir())
    with pytest.raises(TideError, match=match or "unpacked|holds|no empty|not empty|folder"):
        unpack_cache(archive, target)
    assert set(target.parent.iterdir()) == beside
    assert largest_process() - before < 300 << 10  # KiB


@pytest.mark.parametrize("what", NOTES)
def test_notes_that_do_not_hold(what: str, tmp_path: Path) -> None:
    refused(write(tmp_path / "a.tar.zst", NOTES[what], {SHARD: b"x"}), tmp_path / "cache")


@pytest.mark.parametrize("name", NAMES)
def test_names_that_no_cache_has(name: str, tmp_path: Path) -> None:
    refused(write(tmp_path / "a.tar.zst", {name: about(b"x")}, {name: b"x"}), tmp_path / "cache")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
)
def test_members_that_are_no_files(kind: bytes, tmp_path: Path) -> None:
    refused(
        write(tmp_path / "a.tar.zst", {SHARD: about(b"")}, {SHARD: b""}, kind), tmp_path / "cache"
    )


@pytest.mark.parametrize("what", ["content", "note", "header", "end"])
def test_small_archives_that_grow(what: str, tmp_path: Path) -> None:
    """Some hundred kilobytes that would be gigabytes in memory or on disk."""
    path = tmp_path / "a.tar.zst"
    zeros, many = bytes(1 << 20), 3000
    info = tarfile.TarInfo(SHARD if what in ("content", "end") else CHECKSUMS)
    with path.open("wb") as raw, zstandard.ZstdCompressor(level=3).stream_writer(raw) as packed:
        if what in ("content", "end"):
            note = json.dumps(
                {SHARD: about(zeros, bytes=10 if what == "content" else len(zeros))}
            ).encode()
            first = tarfile.TarInfo(CHECKSUMS)
            first.size = len(note)
            packed.write(first.tobuf() + note + bytes(-len(note) % 512))
        if what == "header":
            info.type, info.name = b"x", "pax"
        info.size = len(zeros) if what == "end" else many * len(zeros)
        packed.write(info.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(many):
            packed.write(zeros)
    assert path.stat().st_size < 1 << 20
    refused(path, tmp_path / "cache")


def test_targets_that_are_taken(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "a.tar.zst"
    pack_cache(caches["tiny-cross"], archive)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("file", "full", "link"):
        refused(archive, tmp_path / name)
    monkeypatch.chdir(tmp_path / "empty")
    refused(archive, Path("."))
    monkeypatch.undo()
    assert (tmp_path / "file").read_text() == "mine" and (
        tmp_path / "full" / "x"
    ).read_text() == "mine"
    assert unpack_cache(archive, tmp_path / "empty") > 6


@pytest.mark.faults("files of the user beside ours")
def test_a_folder_of_the_user_beside_the_target_stays(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    pack_cache(caches["tiny-cross"], tmp_path / "a.tar.zst")
    (tmp_path / "cache.unpacking").mkdir()
    (tmp_path / "cache.unpacking" / "thesis").write_text("mine")
    unpack_cache(tmp_path / "a.tar.zst", tmp_path / "cache")
    assert (tmp_path / "cache.unpacking" / "thesis").read_text() == "mine"


@pytest.mark.parametrize("what", ["fifo", "device", "folder", "nothing"])
def test_archives_that_are_no_files(what: str, tmp_path: Path) -> None:
    import os

    path = tmp_path / "a"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "folder":
        path.mkdir()
    refused(path, tmp_path / "cache", "pipe|unpacked")
