import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from shared.system.errors import TideError
from shared.system.files import atomic_file, remove_leftovers, temporary_path, write_bytes

LIMIT = 100 << 10  # bytes
TRAIN = "train --teacher tiny-shared --cache {C} --out {O} --set device=cpu --set heldout.limit=2"
TRAIN += " --set max_steps=2 --set batch_size=2 --set checkpoint_steps=2 --set log_steps=2"
CACHE = "cache --teacher tiny-shared --set data.limit=4 --set engine.device=cpu --out {O}"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(TideError), atomic_file(path) as handle:  # noqa: PT012
        handle.write(b"half of the new")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as handle:
        raise KeyboardInterrupt
    with pytest.raises(TideError):
        write_bytes(path / "inside", b"x")
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


@pytest.mark.slow
@pytest.mark.parametrize("command", [TRAIN, CACHE, "export {S} {O}"])
def test_a_full_disk_is_one_explained_error(
    command: str, caches: dict[str, Path], tmp_path: Path
) -> None:
    """Made by a limit on the size of files: libraries say it in their own words."""
    student = "embedded:student_train/tiny_students/shared"
    words = command.format(S=student, C=caches["tiny-shared"], O=tmp_path / "o").split()
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *words], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT)),
        timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("tide: error: the disk is full") == 1
    assert "Traceback" not in done.stderr


def test_leftovers_of_a_killed_process_go_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "draw=00"
    (folder / "x.tmp").mkdir(parents=True)
    half = temporary_path(folder / "part-00000.parquet")
    assert half != temporary_path(folder / "part-00000.parquet")
    half.write_bytes(b"half")
    kept = ["part-00001.parquet", "chapter.tmp", ".chapter.tmp", ".notes.tide-tmp", "x.tide-tmp"]
    for name in kept:
        (folder / name).write_bytes(b"mine")
    remove_leftovers([tmp_path])
    assert sorted(p.name for p in folder.iterdir()) == sorted([*kept, "x.tmp"])
    half.write_bytes(b"half")
    remove_leftovers([folder / "part-00001.parquet"])
    assert half.exists()
    remove_leftovers([folder / "part-00000.parquet"])
    assert not half.exists()
