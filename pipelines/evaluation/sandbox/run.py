"""Start a judge for a program and wait for its verdict, for so long and no longer."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipelines.evaluation.sandbox.jail import hide_process, landlock_version
from pipelines.evaluation.sandbox.judge import BOOT, ROOT, descendants

_GRACE = 5.0
"""Seconds that a judge has beyond the program's, to start and to end everything."""
_LONGEST_VERDICT = 1 << 16


@dataclass(frozen=True)
class Limits:
    """Of one program: seconds of wall clock and of CPU, bytes of memory, bytes of a file that it writes."""

    seconds: float = 10.0
    memory: int = 4 << 30
    file_size: int = 16 << 20


def run_program(program: str, limits: Limits, test: str = "") -> str:
    """Run `program`, then `test` against what it defined. "passed", or why not: "timed out", or the last line of the
    error.

    The test runs in another process than the program and has what the program returns as plain values, so the program
    cannot make itself pass; that its own code came to its end is what it says itself.
    """
    if landlock_version() == 0:
        hide_process()  # nothing else keeps the program from reading what this process holds
    with tempfile.TemporaryDirectory(prefix="tide-code-", ignore_cleanup_errors=True) as outer:
        folder = Path(outer) / "program"
        folder.mkdir()
        job = {
            "program": program, "test": test, "folder": str(folder), "readable": _readable(), "seconds": limits.seconds,
            "cpu_seconds": math.ceil(limits.seconds), "memory": limits.memory, "file_size": limits.file_size,
        }  # fmt: skip
        (Path(outer) / "job").write_text(json.dumps(job))
        environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                       "TMPDIR": str(folder), "HOME": str(folder)}  # fmt: skip
        command = [*_wrapper(folder), sys.executable, "-I", "-c", BOOT.format("judge"), str(ROOT)]
        with (
            (Path(outer) / "job").open("rb") as given,
            (Path(outer) / "verdict").open("w+b") as verdict,
        ):
            process = subprocess.Popen(
                command, cwd=folder, env=environment, start_new_session=True,
                stdin=given, stdout=verdict, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                process.wait(limits.seconds + _GRACE)
            except subprocess.TimeoutExpired:
                return "timed out"
            finally:
                _end(process)
            verdict.seek(0)
            return _read(verdict.read(_LONGEST_VERDICT), process.returncode)


def _read(content: bytes, code: int) -> str:
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    return found if isinstance(found, str) else f"failed: the test ended early, code {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a judge that is still there, and all below it."""
    if process.poll() is None:
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def _readable() -> list[str]:
    """Folders that Python needs."""
    prefixes = {os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
    prefixes |= {
        str(Path(sys.executable).parent),
        str(Path(os.path.realpath(sys.executable)).parent.parent),
    }
    system = (
        "/usr",
        "/lib",
        "/lib64",
        "/bin",
        "/etc/ld.so.cache",
        "/etc/localtime",
        "/dev/urandom",
        "/dev/zero",
    )
    return sorted(prefixes - {"/"}) + list(system)


@functools.cache
def _bubblewrap() -> str | None:
    """Where it is installed and allowed to work."""
    found = shutil.which("bwrap")
    if found is None:
        return None
    trial = [found, *_spaces(), *_bound(Path("/tmp")), "true"]
    works = subprocess.run(trial, capture_output=True, timeout=10, check=False).returncode == 0
    return found if works else None


def _wrapper(folder: Path) -> list[str]:
    """The beginning of the command: bubblewrap, with namespaces of its own, where there is one."""
    found = _bubblewrap()
    return [] if found is None else [found, *_spaces(), *_bound(folder)]


def _spaces() -> list[str]:
    return ["--unshare-all", "--die-with-parent", "--new-session"]


def _bound(folder: Path) -> list[str]:
    """The file system inside: what Python needs to be read, and `folder`."""
    places = [path for path in (*_readable(), str(ROOT)) if not path.startswith("/dev")]
    parts = [part for path in places for part in ("--ro-bind-try", path, path)]
    return [
        *parts,
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--bind",
        str(folder),
        str(folder),
        "--chdir",
        str(folder),
    ]
