from __future__ import annotations

import errno
from pathlib import Path
from typing import BinaryIO

import pytest

from shared.atomic import remove_leftovers, write_atomically, write_bytes
from shared.errors import TideError


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fails(handle: BinaryIO) -> None:
        handle.write(b"half of the new")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TideError, match="the disk is full"):
        write_atomically(path, fails)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_really_full_disk() -> None:
    """/dev/full answers every write with ENOSPC; the temporary file is a link to it."""
    folder = Path("/dev/shm")
    path = folder / f"tide-test-{id(object())}"
    link = path.with_name(path.name + ".tmp")
    link.symlink_to("/dev/full")
    with pytest.raises(TideError, match="the disk is full"):
        write_bytes(path, b"x" * 100_000)
    assert not path.exists()
    assert not link.is_symlink()


def test_an_unwritable_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TideError, match="cannot be written"):
        write_bytes(tmp_path / "file" / "inside", b"x")


def test_leftovers_of_a_killed_process_go(tmp_path: Path) -> None:
    (tmp_path / "draw=00").mkdir()
    (tmp_path / "draw=00" / "part-00000.parquet.tmp").write_bytes(b"half")
    (tmp_path / "draw=00" / "part-00001.parquet").write_bytes(b"whole")
    remove_leftovers([tmp_path])
    assert [p.name for p in (tmp_path / "draw=00").iterdir()] == ["part-00001.parquet"]
