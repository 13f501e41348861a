"""The metric `code_eval` for code that a student wrote: each program in a sandbox of its own."""

import contextlib
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

from pipelines.evaluation.sandbox import Limits, find_bubblewrap, run_program


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that one of k samples, drawn from `samples`, passes (Chen et al. 2021, eq. 1)."""
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / n for n in range(samples - correct + 1, samples + 1))


class CodeEval:
    """Stands in for the hub's metric `code_eval`: the same call and results, and no download.

    TideError where programs are to be sandboxed and cannot be.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        if limits.sandboxed:
            find_bubblewrap()

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """pass@k over the problems, and what came of each program: `predictions[i]` by its test."""
        places, programs, tests = [], [], []
        for problem, (test, tries) in enumerate(zip(references, predictions, strict=True)):
            for number, program in enumerate(tries):
                places.append((problem, number))
                programs.append(program)
                tests.append(str(test))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            limits = [self._limits] * len(programs)
            verdicts = list(pool.map(run_program, programs, limits, tests))
        results: dict[int, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
        for (problem, number), verdict in zip(places, verdicts, strict=True):
            about = {"task_id": problem, "completion_id": number, "result": verdict}
            results[problem].append((number, {**about, "passed": verdict == "passed"}))
        counts = []  # samples and correct ones, of each problem
        for problem in range(len(predictions)):
            passed = [about["passed"] for _, about in results[problem]]
            counts.append((len(passed), sum(passed)))
        scores = {}
        for n in k:
            if all(samples >= n for samples, _ in counts):
                scores[f"pass@{n}"] = sum(
                    pass_at_k(made, right, n) for made, right in counts
                ) / len(counts)
        return scores, dict(results)


@contextlib.contextmanager
def code_eval_with_limits(limits: Limits) -> Iterator[None]:
    """lm-eval's tasks load the metric `code_eval` from the hub on import; here they get ours."""
    import evaluate

    hub = evaluate.load

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        return CodeEval(limits) if path == "code_eval" else hub(path, *arguments, **options)

    with mock.patch.object(evaluate, "load", load):
        yield
