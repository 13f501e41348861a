"""Files that exist whole or not at all: temporary file, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from shared.system.errors import TideError
from shared.system.signals import lives

_NUMBER = itertools.count()
_OURS = re.compile(r"\.(?P<name>.+)\.(?P<host>[^.]*)-(?P<pid>\d+)-\d+\.tide-tmp")


def this_process() -> str:
    """A name for a file that no other process has, of this host or another."""
    return f"{_host()}-{os.getpid()}"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other process, of this host or another, writes to."""
    return path.with_name(f".{path.name}.{this_process()}-{next(_NUMBER)}.tide-tmp")


def write_atomically(path: Path, write: Callable[[BinaryIO], None], durable: bool = True) -> None:
    """Call `write` on a temporary file beside `path`, sync it to disk (where `durable`), and rename it into place.

    Raises TideError when the disk is full or not writable; then `path` is as it was before.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            write(handle)
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


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE = (
    errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT, errno.EINVAL,
    errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


_FULL_IN_WORDS = (
    "No space left on device",
    "inline_container.cc",
    "Disk quota exceeded",
    "File too large",
)
"""Of libraries that write files themselves; torch names the place in its own source alone."""


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, of the system or of a library that was writing, is for want of room on the disk."""
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


def write_bytes(path: Path, content: bytes, durable: bool = True) -> None:
    """`write_atomically` for content at hand."""

    def write(handle: BinaryIO) -> None:
        handle.write(content)

    write_atomically(path, write, durable)


def link(source: Path, target: Path) -> None:
    """The same file at another place: a hard link, or a copy where the two lie on different file systems."""
    target.parent.mkdir(parents=True, exist_ok=True)
    half = _temporary(target)
    try:
        try:
            os.link(source, half)
        except OSError:
            shutil.copyfile(source, half)
        half.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            half.unlink(missing_ok=True)
        _explain(target, error)
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `folder` at the end; gone where that fails. Where another process was first, its
    folder stays.
    """
    half = _temporary(folder)
    try:
        half.mkdir(parents=True)
    except OSError as error:
        _explain(folder, error)
        raise
    try:
        yield half
        for path in half.rglob("*"):
            if path.is_file():
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
        with contextlib.suppress(FileExistsError):
            _rename_folder(half, folder)
        sync_folder(folder.parent)
    except OSError as error:
        if error.errno in _FULL:
            _explain(folder, error)
        raise
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _rename_folder(half: Path, folder: Path) -> None:
    """FileExistsError where something lies at `folder`; an empty folder there gives way."""
    try:
        half.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(error.errno, error.strerror, str(folder)) from error
        raise


def remove_leftovers(places: Sequence[Path]) -> None:
    """Delete temporary files and folders that a killed process left: those in each folder, or beside each file.

    Only names that this module gives are touched, and of those none whose process lives on this host.
    """
    for place in places:
        folder = place if place.is_dir() else place.parent
        for path in (
            folder.rglob(".*.tide-tmp")
            if place.is_dir()
            else folder.glob(f".{place.name}.*.tide-tmp")
        ):
            if (name := _OURS.fullmatch(path.name)) and not _at_work(
                name["host"], int(name["pid"])
            ):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _at_work(host: str, pid: int) -> bool:
    """Whether another process of this host has that number."""
    return host == _host() and pid != os.getpid() and lives(pid)
