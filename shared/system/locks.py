"""Locks on folders, which the system drops with the process that holds them, however that ends."""

import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from shared.system.errors import TideError

logger = logging.getLogger(__name__)
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@contextmanager
def hold(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, for `what` (as in "the cache X").

    `wait`: until it is free; else TideError, which says who holds it. File systems without flock
    get a file that exists while the lock is held; one of a process that is dead counts for nothing.
    """
    lock: BaseFileLock = FileLock(path, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _acquire(lock, path, what, wait)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            path = path.with_name(path.name + ".held")
            lock = SoftFileLock(path)
            _acquire(lock, path, what, wait)
    except OSError as error:
        raise TideError(
            f"{path.parent} cannot be written: {error.strerror}", fix="choose another folder"
        ) from error
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    _sign(lock, path, f"process {os.getpid()} of {socket.gethostname()} since {since}")
    try:
        yield
    finally:
        _sign(lock, path, "")
        lock.release()


def _sign(lock: BaseFileLock, path: Path, holder: str) -> None:
    if isinstance(lock, FileLock):  # a soft lock's file is the library's
        with contextlib.suppress(OSError):  # a full disk keeps nobody from locking
            path.write_text(holder)


def _acquire(lock: BaseFileLock, path: Path, what: str, wait: bool) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        holder = "another process"
        if isinstance(lock, SoftFileLock):
            holder = f"process {lock.pid}"
        elif (said := path.read_text(errors="replace")[:120]).startswith("process "):
            holder = said
        if not wait:
            raise TideError(
                f"{what} is in use by {holder}",
                fix="wait for it or end it, or choose another folder",
            ) from error
        logger.warning("waiting for %s, in use by %s", what, holder)
        lock.acquire(poll_interval=0.2)
