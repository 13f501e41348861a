"""Files and folders that exist whole or not at all: temporary file, fsync, rename."""

import contextlib
import errno
import itertools
import os
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shared.system.errors import TideError
from shared.system.signals import lives

_NUMBER = itertools.count()
_HOST = re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())
_TEMPORARY = re.compile(r"\..+\.(?P<host>[^.]*)-(?P<pid>\d+)-\d+\.tide-tmp")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What libraries say that write files themselves; torch names the place in its own source alone.
_FULL_IN_WORDS = ("No space left", "inline_container.cc", "quota exceeded", "File too large")
_UNWRITABLE = (
    errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT,
    errno.EINVAL, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


def this_process() -> str:
    """A name that no other process has, of this host or another."""
    return f"{_HOST}-{os.getpid()}"


def temporary_path(path: Path) -> Path:
    """A name beside `path` that nothing else, in this process or another, writes to."""
    return path.with_name(f".{path.name}.{this_process()}-{next(_NUMBER)}.tide-tmp")


@contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A file to fill, which takes the place of `path` only where the block ends well.

    It is synced to disk first where `durable`. TideError where the disk is full or cannot be
    written to.
    """
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            yield handle
            handle.flush()
            if durable:
                os.fsync(handle.fileno())
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)
    except BaseException as error:  # Ctrl-C too leaves nothing half written behind
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            _explain(path, error)
        raise


def write_bytes(path: Path, content: bytes, durable: bool = True) -> None:
    """`atomic_file` for content at hand."""
    with atomic_file(path, durable) as handle:
        handle.write(content)


def link(source: Path, target: Path) -> None:
    """The same file at another place: a hard link, or a copy where the file systems differ."""
    temporary = temporary_path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        write_bytes(target, source.read_bytes())
    else:
        temporary.replace(target)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `folder` at the end and gone where that fails.

    Where another process was first, its folder stays.
    """
    temporary = temporary_path(folder)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        _explain(folder, error)
        raise
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
        try:
            temporary.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        sync_folder(folder.parent)
    except OSError as error:
        if error.errno in _FULL:
            _explain(folder, error)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(places: Sequence[Path]) -> None:
    """Delete what killed processes left in each folder, or beside each file.

    Only names that `temporary_path` gives go, and none whose process lives on this host.
    """
    for place in places:
        inside = place.is_dir()
        pattern = ".*.tide-tmp" if inside else f".{place.name}.*.tide-tmp"
        for path in place.rglob(pattern) if inside else place.parent.glob(pattern):
            made = _TEMPORARY.fullmatch(path.name)
            if made is None:
                continue
            pid = int(made["pid"])
            if made["host"] == _HOST and pid != os.getpid() and lives(pid):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, also of a library that was writing, is for want of room on the disk."""
    return getattr(error, "errno", None) in _FULL or any(
        words in str(error) for words in _FULL_IN_WORDS
    )


def _explain(path: Path, error: OSError) -> None:
    """Raise a TideError for what a user can mend."""
    if disk_is_full(error):
        raise TideError(
            f"the disk is full: {path} could not be written",
            fix="free some space and run the same command again; all finished files are kept",
        ) from error
    if error.errno in _UNWRITABLE:
        raise TideError(
            f"{path} cannot be written: {error.strerror}", fix="choose another folder"
        ) from error
