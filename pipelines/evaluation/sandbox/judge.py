"""Runs the test of a program, which itself runs in another process, and alone says whether it passed.

What the program returns comes as plain values and is compared here, so nothing that the program can reach decides.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, NoReturn

from pipelines.evaluation.sandbox import jail, plain
from pipelines.evaluation.sandbox.remote import Gone, Table

BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); from pipelines.evaluation.sandbox.{} import main; sys.path.pop(0); "
    "del sys.argv[1]; main()"
)
"""What an isolated interpreter runs, whose first argument is the folder of the packages."""
ROOT = Path(__file__).resolve().parents[3]
_RESERVED = frozenset(
    ("__builtins__", "__name__", "__loader__", "__spec__", "__build_class__", "__import__")
)
_IMPORTED = frozenset((
    "bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools",
    "json", "math", "numpy", "operator", "random", "re", "statistics", "string", "typing",
))  # fmt: skip
"""Modules whose names a test may use because the program imported them: the judge imports them itself."""


def names_read(test: str) -> list[str]:
    """Names that the test reads and Python has not."""
    found = {n.id for n in ast.walk(ast.parse(test)) if isinstance(n, ast.Name)}
    return sorted(found - set(dir(builtins)))


def imports_of(program: str) -> dict[str, Any]:
    """What the program imports at its top from modules that are known to be harmless, imported here."""
    found: dict[str, Any] = {}
    try:
        body = ast.parse(program).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return found
    for node in body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in _IMPORTED:
                    module = importlib.import_module(alias.name)
                    name = alias.asname or alias.name.partition(".")[0]
                    found[name] = module if alias.asname else sys.modules[name]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module in _IMPORTED:
            module = importlib.import_module(node.module)
            names = [(a.name, a.asname or a.name) for a in node.names if a.name != "*"]
            found |= {
                ours: getattr(module, theirs) for theirs, ours in names if hasattr(module, theirs)
            }
    return found


def judge(program: str, test: str, table: Table) -> str:
    """The word `passed`, or why not."""
    try:
        wanted = names_read(test)
        imported = imports_of(program)
        theirs = table.ask("load", program, wanted)
        if type(theirs) is not dict:
            raise Gone("nonsense")
        # Only what was asked for: a program that could give more would give the test another abs, or other builtins.
        given = {name: theirs[name] for name in wanted if name in theirs and name not in _RESERVED}
        names = {"__name__": "__main__", **given, **imported}
        exec(compile(test, "test", "exec"), names)
    except Exception as error:
        last = (
            getattr(error, "last_line", None) or traceback.format_exception_only(error)[-1].strip()
        )
        return f"failed: {str(last)[:2000]}"
    return "passed"


def descendants(root: int) -> list[int]:
    """Processes below `root`, orphans among them where it takes these."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text()
                parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
    found, edge = [], {root}
    while edge := {pid for pid, parent in parents.items() if parent in edge}:
        found += sorted(edge)
    return found


def end_all(player: subprocess.Popen[bytes]) -> None:
    """Kill the player and whatever it began, until nothing of it is left."""
    for _ in range(1000):
        alive = [player.pid] if player.poll() is None else []
        if Path("/proc/self/stat").exists():
            alive = [*alive, *descendants(os.getpid())]
        for sign in (
            signal.SIGSTOP,
            signal.SIGKILL,
        ):  # stopped first: a process that forks cannot outrun this
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sign)
        reap()
        if not alive:
            return


def reap() -> None:
    """Take note of children that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def main() -> None:
    """A job as JSON on standard input; the verdict on standard output, by this process alone."""
    job = json.load(sys.stdin)
    verdict_to = os.dup(1)
    nothing = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    jail.guard_process()
    proc = ["/proc"] if Path("/proc/self/stat").exists() else []
    readable = job["readable"]
    jail.lock_in([*readable, *proc, str(ROOT)], [job["folder"], "/dev/null"])
    ours, theirs = socket.socketpair()
    numbers = [str(job[name]) for name in ("memory", "cpu_seconds", "file_size")]
    player = subprocess.Popen(
        [sys.executable, "-I", "-c", BOOT.format("player"), str(ROOT), str(theirs.fileno()), *numbers, job["folder"],
         *readable],
        pass_fds=(theirs.fileno(),), start_new_session=True, stdin=nothing, stdout=nothing, stderr=nothing,
    )  # fmt: skip
    theirs.close()
    resource.setrlimit(resource.RLIMIT_AS, (job["memory"], job["memory"]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    sys.set_int_max_str_digits(0)
    jail.forbid_calls(signals=False)
    said = threading.Lock()

    def say(verdict: str) -> NoReturn:
        with said:  # whoever comes first; the lock is never given back
            end_all(player)
            os.write(verdict_to, json.dumps(verdict).encode())
            os._exit(0)

    clock = threading.Timer(job["seconds"], say, ("timed out",))
    clock.daemon = True
    clock.start()
    try:
        verdict = judge(job["program"], job["test"], Table(plain.Line(ours)))
    except Gone:
        verdict = _how_it_ended(player, ours)
    clock.cancel()
    say(verdict)


def _how_it_ended(player: subprocess.Popen[bytes], ours: socket.socket) -> str:
    ours.close()
    try:
        code = player.wait(0.5)
    except subprocess.TimeoutExpired:
        return "failed: it closed its side, or said what is no value"
    if code == -signal.SIGXCPU:
        return "timed out"
    return f"failed: ended early, code {code}"
