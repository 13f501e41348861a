import errno
from pathlib import Path

import pytest

from shared.system.errors import TideError
from shared.system.files import atomic_file, remove_leftovers, temporary_path, write_bytes


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(TideError), atomic_file(path) as handle:  # noqa: PT012
        handle.write(b"half of the new")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as handle:
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_really_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full answers every write with ENOSPC; the temporary file is a link to it."""
    path, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to("/dev/full")
    monkeypatch.setattr("shared.system.files.temporary_path", lambda _path: link)
    with pytest.raises(TideError):
        write_bytes(path, b"x" * 100_000)
    assert not path.exists()
    assert not link.is_symlink()


def test_an_unwritable_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TideError):
        write_bytes(tmp_path / "file" / "inside", b"x")


def test_leftovers_of_a_killed_process_go_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "draw=00"
    folder.mkdir()
    half = temporary_path(folder / "part-00000.parquet")
    assert half != temporary_path(folder / "part-00000.parquet")
    half.write_bytes(b"half")
    kept = ["part-00001.parquet", "chapter.tmp", ".notes.tide-tmp"]
    for name in kept:
        (folder / name).write_bytes(b"whole")
    (folder / "x.tmp").mkdir()
    remove_leftovers([tmp_path])
    assert sorted(p.name for p in folder.iterdir()) == sorted([*kept, "x.tmp"])
    half.write_bytes(b"half")
    remove_leftovers([folder / "part-00001.parquet"])
    assert half.exists()
    remove_leftovers([folder / "part-00000.parquet"])
    assert not half.exists()
