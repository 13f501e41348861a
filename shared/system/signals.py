"""Signals: the first one ends the work in order, a second one at once.

Children end with their parent.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType
from typing import BinaryIO

_PARENT = "TIDE_PARENT"
_PR_SET_PDEATHSIG = 1
_received: list[int] = []


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


def leave_in_order() -> int:
    """The exit code of a stopped process, which from now on no further signal disturbs.

    It is 128 and the signal's number, as shells have it; 130 where none came.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return 128 + (_received[0] if _received else signal.SIGINT)


def lives(pid: int) -> bool:
    """Whether a process of this host has that number, of whichever user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def end_with_parent() -> None:
    """Where `start_child` started this process: end when the parent is gone, even by kill -9.

    Linux only.
    """
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


def start_child(
    command: Sequence[str], environment: dict[str, str], log: BinaryIO
) -> subprocess.Popen[bytes]:
    """A `tide` process that ends with this one; what it says goes to `log`."""
    environment = {**os.environ, **environment, _PARENT: str(os.getpid())}
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def end_children(children: Sequence[subprocess.Popen[bytes]], patience: float = 20.0) -> None:
    """SIGTERM, and after `patience` seconds SIGKILL."""
    for child in children:
        child.terminate()
    for child in children:
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
