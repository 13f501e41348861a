"""Processes: locks on folders that they share, how they stop, and children that end with them."""

import ctypes
import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from shared.system.files import TideError, explained

logger = logging.getLogger(__name__)
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_PARENT = "TIDE_PARENT"
_PR_SET_PDEATHSIG = 1
_received: list[int] = []


@contextmanager
def hold(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, for `what` (as in "the cache X").

    The system drops it with the process, however that ends. `wait`: until it is free; else
    TideError, which says who holds it. File systems without flock get a file that exists while the
    lock is held; one of a process that is dead counts for nothing.
    """
    lock: BaseFileLock = FileLock(path, fallback_to_soft=False)
    with explained(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _acquire(lock, path, what, wait)
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            path = path.with_name(path.name + ".held")
            lock = SoftFileLock(path)
            _acquire(lock, path, what, wait)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    _sign(lock, path, f"process {os.getpid()} of {socket.gethostname()} since {since}")
    try:
        yield
    finally:
        _sign(lock, path, "")
        lock.release()


def _sign(lock: BaseFileLock, path: Path, holder: str) -> None:
    if isinstance(lock, FileLock):  # a soft lock's file is the library's
        with suppress(OSError):  # a full disk keeps nobody from locking
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
            fix = "wait for it or end it, or choose another folder"
            raise TideError(f"{what} is in use by {holder}", fix=fix) from error
        logger.warning("waiting for %s, in use by %s", what, holder)
        lock.acquire(poll_interval=0.2)


def stop_in_order() -> None:
    """From now on SIGINT and SIGTERM raise KeyboardInterrupt, which closes what is open.

    A second one ends the process at once.
    """

    def handle(number: int, _: FrameType | None) -> None:
        if _received:
            sys.stderr.write("\ntide: stopped at once\n")
            sys.stderr.flush()
            os._exit(128 + number)
        _received.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


@contextmanager
def stop_is_asked(said: str) -> Iterator[list[float]]:
    """For a block that looks itself whether a signal came, to which `said` answers; when. A second
    one does what it did before, but not within a second: a key is pressed twice, or whoever started
    this process passes on what both had.
    """
    asked: list[float] = []

    def note(number: int, _: FrameType | None) -> None:
        if not asked:
            asked.append(time.monotonic())
            _received.append(number)
            os.write(2, f"\ntide: {said}\n".encode())
        elif time.monotonic() > asked[0] + 1:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    main = threading.current_thread() is threading.main_thread()  # no other may
    before: Any = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_in_order() -> int:
    """The exit code of a stopped process, which from now on no further signal disturbs.

    It is 128 and the signal's number, as shells have it; 130 where none came.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return 128 + (_received[0] if _received else signal.SIGINT)


def start_child(
    command: Sequence[str], environment: dict[str, str], log: BinaryIO
) -> subprocess.Popen[bytes]:
    """A `tide` process that ends with this one; what it says goes to `log`."""
    environment = {**os.environ, **environment, _PARENT: str(os.getpid())}
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def end_with_parent() -> None:
    """In a process of `start_child`: end when the parent is gone, even by kill -9. Linux only."""
    parent = os.environ.pop(_PARENT, None)
    if parent is not None:
        _follow(int(parent))


def serve_parent(parent: int) -> None:
    """The initializer of a pool's processes: they end with their parent, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _follow(parent)


def _follow(parent: int) -> None:
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it went before this was asked for
        os.kill(os.getpid(), signal.SIGTERM)


def end_children(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGTERM, and to those that do not end SIGKILL."""
    for child in children:
        child.terminate()
    for child in children:
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
