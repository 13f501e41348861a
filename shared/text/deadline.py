"""A limit on time for code that came with data: chat templates are programs, and some never end."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class OutOfTime(Exception):
    """The time is over."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """OutOfTime where the body takes longer. It stops Python code, not a single call of a library."""
    if threading.current_thread() is threading.main_thread():
        yield from _by_alarm(seconds)
    else:
        yield from _by_thread(seconds)


def _by_alarm(seconds: float) -> Iterator[None]:
    def over(_: int, __: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _by_thread(seconds: float) -> Iterator[None]:
    ident, done = threading.get_ident(), threading.Event()

    def over() -> None:
        if not done.wait(seconds):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(ident), ctypes.py_object(OutOfTime)
            )

    watcher = threading.Thread(target=over, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
