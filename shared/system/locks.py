"""Locks on folders, which the system drops with the process that holds them, however that ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.system.errors import TideError
from shared.system.signals import lives

_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_LOOK_SECONDS = 0.2


@contextmanager
def hold(path: Path, what: str, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, for `what` (as in "the cache X"), alone or with others that share it.

    `wait`: until it is free, with a word on stderr; else TideError, which says who holds it. File systems without
    flock get POSIX locks, and those without either a file that exists while the lock is held; such a file, left by a
    process of this host that is dead, counts for nothing.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise TideError(
            f"{path.parent} cannot be written: {error.strerror}", fix="choose another folder"
        ) from error
    try:
        stand_in = _take(descriptor, path, shared, what, wait)
        if not shared:
            _sign(descriptor)
        try:
            yield
        finally:
            if not shared:
                os.ftruncate(descriptor, 0)  # nobody holds it
            if stand_in is not None:
                stand_in.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _take(descriptor: int, path: Path, shared: bool, what: str, wait: bool) -> Path | None:
    """Lock; the file that stands for the lock where the system has no locks. Waits, or TideError."""
    said = False
    while True:
        try:
            return _try(descriptor, path, shared)
        except BlockingIOError as error:
            if not wait:
                raise TideError(
                    f"{what} is in use by {_holder(path)}",
                    fix="wait for it or end it, or choose another folder",
                ) from error
        if not said:
            print(f"waiting for {what}, in use by {_holder(path)}", file=sys.stderr)
            said = True
        time.sleep(_LOOK_SECONDS)


def _try(descriptor: int, path: Path, shared: bool) -> Path | None:
    """Lock by the first means that works here. BlockingIOError where another holds it."""
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    means: tuple[Callable[[int, int], None], ...] = (fcntl.flock, fcntl.lockf)
    for lock in means:
        try:
            lock(descriptor, kind)
            return None
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise BlockingIOError from error
            if error.errno not in _UNSUPPORTED:
                raise TideError(
                    f"{path} cannot be locked: {error.strerror}", fix="choose another folder"
                ) from error
    return None if shared else _exclusive_file(path.with_name(path.name + ".held"))


def _exclusive_file(path: Path) -> Path:
    """A file that stands for the lock. BlockingIOError where it is there and its maker may live."""
    for _ in range(2):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            if not _dead(path):
                raise BlockingIOError from None
            path.unlink(missing_ok=True)
            continue
        _sign(descriptor)
        os.close(descriptor)
        return path
    raise BlockingIOError


def _dead(path: Path) -> bool:
    """Whether the process that signed `path` was of this host and is no more."""
    try:
        signed = json.loads(path.read_text())
        return signed["host"] == socket.gethostname() and not lives(int(signed["pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sign(descriptor: int) -> None:
    """Who holds it, for whoever comes second."""
    signature = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with contextlib.suppress(OSError):  # a full disk keeps nobody from locking
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(signature) + "\n").encode(), 0)


def _holder(path: Path) -> str:
    for place in (path.with_name(path.name + ".held"), path):
        try:
            signed = json.loads(place.read_text())
            return f"process {int(signed['pid'])} of {str(signed['host'])[:64]} since {str(signed['since'])[:32]}"
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return "another process"
