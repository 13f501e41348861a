"""`tide eval`: a student on a list of benchmarks. Finished ones are kept; an interrupted one goes on where it was."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines.evaluation.answers import Answers
from pipelines.evaluation.code_eval import code_eval_with_limits
from pipelines.evaluation.data import load_tasks
from pipelines.evaluation.recipe import Benchmark, packaged
from pipelines.evaluation.results import Score, digest, finished, read_scores, save
from pipelines.evaluation.sandbox.run import Limits
from shared.models.checkpoint import open_checkpoint, resolve
from shared.system.errors import TideError
from shared.system.hardware import choose_device, shut_down_process_group
from shared.system.locks import hold
from student_train.using.load import load_for_use


@dataclass(frozen=True)
class EvalSettings:
    """How to ask, for all benchmarks. `sampling` and `mc_num` are arguments of `tide_bd3lm`."""

    sampling: dict[str, Any] = field(default_factory=dict)
    batch: int = 8
    device: str = "auto"
    limit: int | None = None
    data: dict[str, Path] = field(default_factory=dict)
    run_code: bool = False
    limits: Limits = field(default_factory=Limits)


def run_benchmarks(
    student: str, benchmarks: list[Benchmark], settings: EvalSettings, out: Path
) -> list[Score]:
    """Measure, and return the scores in the order asked. Everything that can be wrong is looked at before the model."""
    check_installed()
    unknown = set(settings.data) - {b.name for b in benchmarks}
    if unknown:
        names = ", ".join(b.name for b in benchmarks)
        raise TideError(
            f"--data names {', '.join(sorted(unknown))}",
            expected=f"benchmarks of this call: {names}",
        )
    checkpoint = open_checkpoint(resolve(student))
    fingerprint = checkpoint.fingerprint()
    block = settings.sampling.get("block_size") or checkpoint.config.get("block_size") or 32
    settings = replace(settings, sampling={**settings.sampling, "block_size": block})
    described = {b.name: _describe(b, settings, fingerprint) for b in benchmarks}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TideError(
            f"{out} cannot be made: {error.strerror}", fix="give another --output"
        ) from error
    open_ones = [b for b in benchmarks if not finished(out, b, described[b.name])]
    if open_ones:
        with ExitStack() as held, code_eval_with_limits(settings.limits):
            tasks = _tasks(open_ones, settings)
            if os.environ.get("RANK", "0") == "0":
                held.enter_context(hold(out / ".lock", f"the evaluation in {out}"))
            _measure(student, tasks, settings, described, out)
    found = {score.name: score for score in read_scores(out)}
    return [found[b.name] for b in benchmarks if b.name in found]


def default_output(student: str) -> Path:
    """Beside a run's model; for anything else below runs/."""
    folder = Path(student)
    if folder.is_dir() and folder.name == "model":
        return folder.parent / "eval"
    return Path("runs") / f"eval-{folder.name}"


def check_installed(quiet: bool = True) -> None:
    """TideError without lm-eval. `quiet`: its log shows errors alone."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise TideError("lm-eval is not installed", fix="pip install '.[eval]'") from error
    if quiet:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _describe(benchmark: Benchmark, settings: EvalSettings, fingerprint: str) -> dict[str, Any]:
    """All that a score depends on."""
    place = settings.data.get(benchmark.name)
    rows = None if place is None else str(place)
    if place is not None and place.is_file():
        rows = hashlib.sha256(place.read_bytes()).hexdigest()[:16]
    return {
        "student": fingerprint,
        **{
            key: value
            for key, value in asdict(benchmark).items()
            if key not in ("name", "title", "metric")
        },
        **settings.sampling,
        "device": choose_device(settings.device).type,
        "limit": settings.limit,
        "rows": rows,
        "lm_eval": version("lm-eval"),
    }


def _tasks(
    benchmarks: list[Benchmark], settings: EvalSettings
) -> dict[str, tuple[Benchmark, dict[str, Any]]]:
    """lm-eval's tasks with their rows, by benchmark. TideError where one would run code and that was not allowed."""
    found = {}
    manager = _task_manager()
    for benchmark in benchmarks:
        loaded = load_tasks(manager, benchmark, settings.data.get(benchmark.name))
        if not settings.run_code and any(
            getattr(t, "UNSAFE_CODE", False) for t in loaded["tasks"].values()
        ):
            raise TideError(
                f"{benchmark.name} runs the code that the student writes",
                expected="your consent",
                fix="add --confirm-run-unsafe-code, best in a container: the code is kept from your files, processes "
                "and the network as far as this kernel can (docs/benchmarks.md), which is no virtual machine",
            )
        found[benchmark.name] = (benchmark, loaded)
    return found


@functools.cache
def _task_manager() -> Any:
    """lm-eval's tasks and ours. Reading its 14,000 files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(packaged("tasks")))


def _measure(
    student: str,
    tasks: dict[str, tuple[Benchmark, dict[str, Any]]],
    settings: EvalSettings,
    described: dict[str, dict[str, Any]],
    out: Path,
) -> None:
    import lm_eval

    from pipelines.evaluation.model import TideBD3LM
    from pipelines.evaluation.processes import Processes

    processes = Processes()
    loaded = load_for_use(student, processes.device(settings.device))
    for name, (benchmark, task) in tasks.items():
        started = time.monotonic()
        answers = Answers(out / f".{name}-{digest(described[name])}_rank{processes.rank}.jsonl")
        model = TideBD3LM(
            loaded,
            answers=answers,
            batch_size=settings.batch,
            max_new_tokens=benchmark.new_tokens,
            steps=benchmark.steps,
            **settings.sampling,
        )
        evaluate: Any = lm_eval.simple_evaluate
        found = evaluate(
            model=model,
            tasks=[task["groups"].get(benchmark.task) or task["tasks"][benchmark.task]],
            num_fewshot=benchmark.shots,
            limit=settings.limit,
            apply_chat_template=benchmark.chat,
            fewshot_as_multiturn=benchmark.chat,
            confirm_run_unsafe_code=settings.run_code,
            bootstrap_iters=1000,
            task_manager=_task_manager(),
        )
        if found is not None:
            about = {"seconds": time.monotonic() - started, "prompts_cut": model.truncated}
            save(out, benchmark, described[name], found, about)
            if model.truncated:
                print(
                    f"{name}: {model.truncated} prompts lost their beginning, too long to fit",
                    file=sys.stderr,
                )
        processes.barrier()
        answers.discard()
    shut_down_process_group()
