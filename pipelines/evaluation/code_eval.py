"""Running generated code: a process of its own for each program, with limits on time, memory and files.

The limits stop loops, memory bombs and stray files; they are no jail. A program can still read what you can read and
use the network. Run benchmarks that execute code in a container or on a machine that holds nothing you would miss.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

_RUNNER = """
import resource, sys
memory, seconds, size = (int(value) for value in sys.argv[1:])
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
token, _, program = sys.stdin.read().partition(chr(10))
report = sys.stdout
sys.stdin = sys.stdout = open("/dev/null", "r+")
exec(compile(program, "program", "exec"), {"__name__": "__main__"})
report.write(token)
report.flush()
"""


@dataclass(frozen=True)
class Limits:
    """Of one program: seconds of wall clock and of CPU, bytes of memory, bytes of a file that it writes."""

    seconds: float = 10.0
    memory: int = 4 << 30
    file_size: int = 16 << 20


def run_program(program: str, limits: Limits) -> str:
    """Run Python code to its end. "passed", or why not: "timed out", or the last line of its error.

    Passed means that the last line was reached: a program that exits early, with whatever code, has not passed.
    """
    token = secrets.token_hex(16)
    arguments = [str(limits.memory), str(math.ceil(limits.seconds)), str(limits.file_size)]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="tide-code-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _RUNNER, *arguments],
            cwd=folder, env={**environment, "TMPDIR": folder, "HOME": folder}, start_new_session=True, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, errors="replace",
        )  # fmt: skip
        try:
            output, errors = process.communicate(f"{token}\n{program}", timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its children too
            process.communicate()
    if output == token:
        return "passed"
    if process.returncode == -signal.SIGXCPU:
        return "timed out"
    return f"failed: {(errors.strip().splitlines() or [f'ended early, code {process.returncode}'])[-1]}"


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that one of k samples, drawn from `samples` of which `correct` pass, passes (Chen et al. 2021, eq. 1)."""
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / n for n in range(samples - correct + 1, samples + 1))


class CodeEval:
    """Stands in for the hub's metric `code_eval`: the same call and results, no download, the limits above."""

    def __init__(self, limits: Limits | None = None, workers: int | None = None) -> None:
        self._limits = limits or Limits()
        self._workers = workers or os.cpu_count() or 1

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100)
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """pass@k over the problems, and what came of each program: `predictions[i]` each followed by its test."""
        jobs = [(i, j, code) for i, tries in enumerate(predictions) for j, code in enumerate(tries)]
        with ThreadPoolExecutor(self._workers) as pool:
            found = pool.map(lambda job: run_program(f"{job[2]}\n{references[job[0]]}", self._limits), jobs)
            results: dict[int, list[tuple[int, dict[str, Any]]]] = {i: [] for i in range(len(predictions))}
            for (i, j, _), result in zip(jobs, found, strict=True):
                about = {"task_id": i, "passed": result == "passed", "result": result, "completion_id": j}
                results[i].append((j, about))
        totals = [len(tries) for tries in predictions]
        correct = [sum(about["passed"] for _, about in results[i]) for i in range(len(predictions))]
        scores = {
            f"pass@{n}": sum(pass_at_k(a, c, n) for a, c in zip(totals, correct, strict=True)) / len(totals)
            for n in k
            if all(total >= n for total in totals)
        }
        return scores, results


@contextlib.contextmanager
def code_eval_with_limits(limits: Limits | None = None) -> Iterator[None]:
    """lm-eval's code tasks load the metric `code_eval` from the hub when they are imported; here they get ours."""
    import evaluate

    hub = evaluate.load

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        return CodeEval(limits) if path == "code_eval" else hub(path, *arguments, **options)

    with mock.patch.object(evaluate, "load", load):
        yield
