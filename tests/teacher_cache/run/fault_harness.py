"""Stage one killed, or its disk filled, wherever it touches the disk. A program of its own.

A point is a step of `shared.system.files`: a temporary file opened, written, synced, renamed, its
folder synced. For each point a forked child builds a cache and meets the fault there; a second
child finishes the cache, which must then be byte for byte the one that met none. Prints the number
of cases as JSON.
"""

import errno
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shared.settings.build import build
from shared.settings.config import CacheConfig
from shared.system import files as system_files
from shared.system.errors import TideError
from teacher_cache.run.build import build_cache
from tests.conftest import files

Fault = Callable[[], None]


def kill() -> None:
    """As `kill -9` does it."""
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk() -> None:
    """As a full disk answers."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Points:
    """Counts the points and meets `fault` at number `at`."""

    def __init__(self, at: int, fault: Fault) -> None:
        self.seen, self._at, self._fault = 0, at, fault
        self.met_in = ""

    def point(self, path: Path | None = None) -> None:
        """One more, at a file of which the name is known or not."""
        self.seen += 1
        if self.seen == self._at:
            self.met_in = "elsewhere" if path is None else path.name
            self._fault()

    def install(self) -> None:
        """Put a point before each step of `atomic_file`, and one in the middle of writing."""
        real_fsync, real_replace, real_open, real_sync = (
            os.fsync,
            Path.replace,
            Path.open,
            system_files.sync_folder,
        )

        def fsync(descriptor: int) -> None:
            self.point()
            real_fsync(descriptor)

        def replace(path: Path, target: Any) -> Path:
            self.point(path)
            return real_replace(path, target)

        def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not (path.name.endswith(".tide-tmp") and mode == "wb"):
                return real_open(path, mode, *args, **kwargs)
            self.point(path)
            handle: Any = real_open(path, mode, *args, **kwargs)
            handle.write(b"half of it")  # what a fault in the middle leaves behind
            self.point(path)
            handle.seek(0)
            handle.truncate()
            return handle

        def sync(folder: Path) -> None:
            self.point()
            real_sync(folder)

        system_files.os.fsync = fsync
        Path.replace = replace  # type: ignore[method-assign]
        Path.open = opened  # type: ignore[method-assign]
        system_files.sync_folder = sync


def in_child(work: Callable[[], int]) -> int:
    """Exit code of `work` in a forked child; negative where a signal ended it."""
    pid = os.fork()
    if pid == 0:
        code = 99
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - progress bars of a hundred builds
        try:
            code = work()
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def meets(config: dict[str, Any], at: int, fault: Fault, expected: str) -> Callable[[], int]:
    """A build that meets a fault. 0: it came to its end without it, 3: it stopped with the expected
    message, 5: the fault was in writing how far it is, for which no build stops.
    """

    def work() -> int:
        points = Points(at, fault)
        points.install()
        try:
            build_cache(build(CacheConfig, config))
        except TideError as error:
            return 3 if expected in str(error) else 4
        if not points.met_in:
            return 0
        return 5 if points.met_in.startswith(".status") else 6

    return work


def run(config: dict[str, Any], folder: Path, fault: Fault, ends: int, expected: str) -> int:
    """All points of one fault; how many there were."""
    whole = folder / "whole"
    assert in_child(meets({**config, "out": str(whole)}, 0, fault, "")) == 0
    at = 0
    while True:
        at += 1
        settings = {**config, "out": str(folder / f"at-{at}")}
        code = in_child(meets(settings, at, fault, expected))
        if code == 0:
            assert files(folder / f"at-{at}") == files(whole)
            return at - 1
        assert code == ends or (code == 5 and fault is fill_disk), f"point {at}: exit code {code}"
        assert in_child(meets(settings, 0, fault, "")) == 0, (
            f"point {at}: the next run did not finish"
        )
        assert files(folder / f"at-{at}") == files(whole), f"point {at}: another cache"
        assert not list((folder / f"at-{at}").rglob(".*.tide-tmp")), f"point {at}: leftovers"
        shutil.rmtree(folder / f"at-{at}")


def main() -> None:
    """Arguments: the cache's settings as JSON, a folder to work in."""
    torch.set_num_threads(1)
    config, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    cases = {
        "killed": run(config, folder / "kill", kill, -signal.SIGKILL, ""),
        "disk full": run(config, folder / "full", fill_disk, 3, "the disk is full"),
    }
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
