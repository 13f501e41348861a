"""The metric `code_eval` for code that a student wrote: each program apart, judged by its test (`sandbox`).

A program has limits on time, memory and the size of files, cannot reach the network, other processes or files outside
its folder (as far as this kernel has Landlock, or bubblewrap is installed), and does not itself decide whether it
passed. It is no virtual machine: a hole in the kernel is a hole here.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

from pipelines.evaluation.sandbox.run import Limits, run_program


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
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """pass@k over the problems, and what came of each program: `predictions[i]` each judged by its test."""
        jobs = [(i, j, code) for i, tries in enumerate(predictions) for j, code in enumerate(tries)]
        with ThreadPoolExecutor(self._workers) as pool:
            found = pool.map(
                lambda job: run_program(job[2], self._limits, str(references[job[0]])), jobs
            )
            results: dict[int, list[tuple[int, dict[str, Any]]]] = {
                i: [] for i in range(len(predictions))
            }
            for (i, j, _), result in zip(jobs, found, strict=True):
                about = {
                    "task_id": i,
                    "passed": result == "passed",
                    "result": result,
                    "completion_id": j,
                }
                results[i].append((j, about))
        totals = [len(tries) for tries in predictions]
        correct = [sum(about["passed"] for _, about in results[i]) for i in range(len(predictions))]
        scores = {
            f"pass@{n}": sum(pass_at_k(a, c, n) for a, c in zip(totals, correct, strict=True))
            / len(totals)
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
