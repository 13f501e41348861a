"""Programs that try to pass, to look, to stay, or to flood."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.evaluation.sandbox import run as run_module
from pipelines.evaluation.sandbox.jail import landlock_version
from pipelines.evaluation.sandbox.run import Limits, run_program
from shared.system.hardware import largest_process
from tests.faults.forged import FORGED
from tests.pipelines.evaluation.test_code_eval import processes_with

pytestmark = pytest.mark.faults("code in benchmarks")
QUICK = Limits(seconds=3.0, memory=1 << 30, file_size=1 << 20)
TEST = "def check(f):\n    assert f([1, 2]) == 3\n    assert f([]) == 0\n\ncheck(total)"
TESTS = {
    "a function": TEST,
    "abs": "assert abs(total([1, 2]) - 3) < 1e-6",
    "all and map": "assert all(map(lambda x: total(x) == 0, [[], [0]]))",
    "len": "assert len([total([]) == 0, total([0]) == 0].count(False) * 'x') == 0",
}
WRONG = "def total(xs):\n    return 7\n"
NEEDS_LANDLOCK = pytest.mark.skipif(
    landlock_version() < 6, reason="this kernel has no Landlock of version 6"
)


@pytest.mark.parametrize("how", FORGED)
@pytest.mark.parametrize("test", TESTS)
def test_a_wrong_program_does_not_pass(how: str, test: str) -> None:
    assert run_program(FORGED[how], QUICK, TESTS[test]).startswith("failed")


def test_a_right_program_passes_and_its_error_is_told() -> None:
    assert run_program("def total(xs):\n    return sum(xs)", QUICK, TEST) == "passed"
    assert run_program(WRONG, QUICK, TEST) == "failed: AssertionError"
    assert (
        run_program("def total(xs):\n    return xs[9]", QUICK, TEST)
        == "failed: IndexError: list index out of range"
    )


RICH = {
    "a list changed in place": ("def f(xs):\n    xs.sort()", "a = [3, 1]\nassert f(a) is None and a == [1, 3]"),
    "a generator": ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2]"),
    "a class": ("class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)",
                "s = Stack()\ns.push(1)\ns.push(2)\nassert s.items == [1, 2]"),
    "a function of the test's": ("def f(g, x):\n    return g(x) + 1", "assert f(lambda v: v * 2, 3) == 7"),
    "an error of the program's": (
        "class Odd(ValueError): pass\ndef f():\n    raise Odd('no')",
        "try:\n    f()\nexcept ValueError as e:\n    assert str(e) == 'no'\nelse:\n    assert False",
    ),
    "a name it imported": ("import math\ndef f(x):\n    return math.pi", "assert f(0) == math.pi"),
    "a large number": ("def f():\n    return 3 ** 20000", "assert f() == 3 ** 20000"),
    "tuples, sets, dicts": ("def f():\n    return {(1, 2): {3, 4}, 'x': (None, 1.5, b'a')}",
                            "assert f() == {(1, 2): {3, 4}, 'x': (None, 1.5, b'a')}"),
    "not a number": ("def f():\n    return float('nan')", "assert f() != f()"),
    "a constant": ("LIMIT = [1, 2]", "assert LIMIT == [1, 2]"),
}  # fmt: skip


@pytest.mark.parametrize("what", RICH)
def test_right_programs_of_every_shape_pass(what: str) -> None:
    program, test = RICH[what]
    assert run_program(program, QUICK, test) == "passed"


def test_a_child_in_its_own_session_holds_nobody_up(tmp_path: Path) -> None:
    word = f"stays-{os.getpid()}"
    child = f"import time; {word!r}; time.sleep(600)"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)"
    began = time.monotonic()
    assert run_program(program, QUICK) == "passed"
    assert time.monotonic() - began < 20
    assert processes_with(word) == []


def test_a_daemon_that_forks_twice_is_ended() -> None:
    word = f"daemon-{os.getpid()}"
    child = f"import time; {word!r}; time.sleep(600)"
    program = (
        "import os, subprocess, sys, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        f"        subprocess.run([sys.executable, '-c', {child!r}])\n"
        "    os._exit(0)\ntime.sleep(0.5)"
    )
    run_program(program, QUICK)
    assert processes_with(word) == []


def test_programs_that_multiply_are_ended() -> None:
    word = f"many-{os.getpid()}"
    program = f"import os, time\n{word!r}\nfor _ in range(6):\n    os.fork()\ntime.sleep(600)"
    assert run_program(program, QUICK) == "timed out"
    assert processes_with(word) == []


@pytest.mark.parametrize("stream", ["stdout", "stderr", "stdout.buffer"])
def test_floods_do_not_reach_us(stream: str) -> None:
    before = largest_process()
    data = "x.encode()" if "buffer" in stream else "x"
    program = (
        "import sys, time\nend, x = time.time() + 1, 'x' * (1 << 20)\n"
        f"while time.time() < end:\n    sys.{stream}.write({data})"
    )
    assert run_program(program, QUICK) == "passed"
    assert largest_process() - before < 64 << 10  # KiB


def test_a_value_without_end_fails() -> None:
    assert run_program("def total(xs):\n    return 'x' * (1 << 28)", QUICK, TEST) != "passed"


def secret_of(pid: str) -> str:
    return f"import os\ntext = open(f'/proc/{{{pid}}}/environ', 'rb').read()\nassert b'hidden' not in text, 'seen'"


@pytest.mark.parametrize("pid", ["os.getppid()", "int(open('/proc/self/stat').read().split()[3])"])
def test_the_environment_of_who_started_it_is_not_readable(
    pid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hidden")
    assert "seen" not in run_program(secret_of(pid), QUICK)


def denied(found: str) -> bool:
    """By Landlock or seccomp; by bubblewrap, in whose world there is no such thing."""
    words = ("PermissionError", "FileNotFoundError", "ProcessLookupError", "Read-only file system")
    return found.startswith("failed: ") and any(word in found for word in words)


@NEEDS_LANDLOCK
def test_no_process_above_it_can_be_read_or_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hidden")
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        for pid in (victim.pid, os.getpid(), os.getppid()):
            look = f"open('/proc/{pid}/environ', 'rb').read()"
            assert denied(run_program(look, QUICK))
            assert denied(run_program(f"import os\nos.kill({pid}, 0)", QUICK))
        run_program("import os\nos.kill(-1, 15)", QUICK)
        assert victim.poll() is None
        assert "PermissionError" in run_program("import os\nos.kill(os.getppid(), 9)", QUICK)
    finally:
        victim.kill()
        victim.wait()


@NEEDS_LANDLOCK
@pytest.mark.parametrize("place", ["home", "package"])
def test_files_elsewhere_are_neither_read_nor_written(place: str, tmp_path: Path) -> None:
    folder = tmp_path if place == "home" else Path(__file__).parent
    if place == "home":
        (tmp_path / "secret").write_text("hidden")
        assert denied(run_program(f"open({str(tmp_path / 'secret')!r}).read()", QUICK))
    assert denied(run_program(f"open({str(folder / 'new.txt')!r}, 'w')", QUICK))
    assert not (folder / "new.txt").exists()


def test_the_network_is_not_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"
        assert "PermissionError" in run_program(program, QUICK)


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_bubblewrap_is_used_and_hides_everything(tmp_path: Path) -> None:
    if run_module._bubblewrap() is None:
        pytest.skip("bubblewrap is not allowed to work here")
    (tmp_path / "secret").write_text("hidden")
    assert run_program("def total(xs):\n    return sum(xs)", QUICK, TEST) == "passed"
    assert (
        run_program("import os\nassert os.getpid() < 30", QUICK) == "passed"
    )  # the only ones that there are
    assert "FileNotFoundError" in run_program(f"open({str(tmp_path / 'secret')!r})", QUICK)


@pytest.mark.parametrize("how", ["exit", "every descriptor", "an object that equals all"])
def test_without_bubblewrap_the_judge_is_as_strict(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "_bubblewrap", lambda: None)
    assert run_program(FORGED[how], QUICK, TEST).startswith("failed")
    assert run_program("def total(xs):\n    return sum(xs)", QUICK, TEST) == "passed"


def test_a_test_that_never_ends_is_ended() -> None:
    began = time.monotonic()
    assert run_program("x = 1", QUICK, "while True: pass") == "timed out"
    assert run_program("def f(xs):\n    yield from iter(int, 1)", QUICK, "list(f(1))") in (
        "timed out",
        "failed: MemoryError",
    )
    assert time.monotonic() - began < 30
