"""Memory of a job, measured in a process of its own: the high-water mark is then its own (Linux)."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from shared.system.errors import TideError
from shared.system.hardware import high_water


def in_process(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> int:
    """Bytes that a job adds to a fresh process. `prepare` (a function of a module) loads what is not the job's."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_run, args=(theirs, prepare, arguments)
    )
    process.start()
    theirs.close()
    try:
        found: int = ours.recv()
    except EOFError:
        process.join()
        raise TideError("measuring memory failed", fix="see the error above") from None
    process.join()
    return found


def _run(
    result: Connection, prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]
) -> None:
    job = prepare(*arguments)
    before = high_water()
    job()
    result.send(high_water() - before)
