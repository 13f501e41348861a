"""Files that exist whole or not at all: temporary file, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from shared.errors import TideError

_NUMBER = itertools.count()
_OURS = re.compile(r"\.(?P<name>.+)\.[^.]*-\d+-\d+\.tide-tmp")


def this_process() -> str:
    """A name for a file that no other process has, of this host or another."""
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', socket.gethostname())}-{os.getpid()}"


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other process, of this host or another, writes to."""
    return path.with_name(f".{path.name}.{this_process()}-{next(_NUMBER)}.tide-tmp")


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` on a temporary file beside `path`, sync it to disk, and rename it into place.

    Raises TideError when the disk is full or not writable; then `path` is as it was before.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            write(handle)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException as error:  # Ctrl-C too leaves nothing half written behind
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            _explain(path, error)
        raise


def _explain(path: Path, error: OSError) -> None:
    """Raise a TideError for what a user can mend."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise TideError(
            f"the disk is full: {path} could not be written",
            fix="free some space and run the same command again; all finished files are kept",
        ) from error
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
        raise TideError(f"{path} cannot be written: {error.strerror}", fix="choose another folder") from error


def write_bytes(path: Path, content: bytes) -> None:
    """`write_atomically` for content at hand."""

    def write(handle: BinaryIO) -> None:
        handle.write(content)

    write_atomically(path, write)


def link(source: Path, target: Path) -> None:
    """The same file at another place: a hard link, or a copy where the two lie on different file systems."""
    target.parent.mkdir(parents=True, exist_ok=True)
    half = _temporary(target)
    try:
        os.link(source, half)
    except OSError:
        shutil.copyfile(source, half)
    half.replace(target)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(places: Sequence[Path]) -> None:
    """Delete temporary files that a killed process left: those in each folder, or beside each file.

    Only names that `write_atomically` gives are touched.
    """
    for place in places:
        folder = place if place.is_dir() else place.parent
        for path in folder.rglob(".*.tide-tmp") if place.is_dir() else folder.glob(f".{place.name}.*.tide-tmp"):
            if _OURS.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)
