"""`tide eval`: a student on benchmarks. Finished ones are kept; an interrupted one goes on."""

import functools
import hashlib
import logging
import os
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines.evaluation.code_eval import code_eval_with_limits
from pipelines.evaluation.recipe import Benchmark, load_tasks, packaged
from pipelines.evaluation.results import Answers, Score, digest, finished, read_scores, save
from pipelines.evaluation.sandbox import Limits
from shared.models.checkpoint import open_checkpoint, resolve
from shared.system.errors import TideError
from shared.system.hardware import choose_device, shut_down_process_group
from shared.system.processes import hold
from student_train.using.student import load_for_use

logger = logging.getLogger(__name__)


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
    """Measure, and return the scores in the order asked.

    TideError for whatever is wrong, before the model is loaded.
    """
    check_installed()
    if unknown := sorted(set(settings.data) - {b.name for b in benchmarks}):
        names = ", ".join(b.name for b in benchmarks)
        raise TideError(f"--data names {', '.join(unknown)}", expected=f"one of {names}")
    # 1. All that a score depends on
    checkpoint = open_checkpoint(resolve(student))
    block = settings.sampling.get("block_size") or checkpoint.config.get("block_size") or 32
    settings = replace(settings, sampling={**settings.sampling, "block_size": block})
    common = {
        "student": checkpoint.fingerprint(), **settings.sampling, "limit": settings.limit,
        "device": choose_device(settings.device).type, "lm_eval": version("lm-eval"),
    }  # fmt: skip
    described = {}
    for benchmark in benchmarks:
        rows: Any = settings.data.get(benchmark.name)
        if rows is not None:
            content = rows.is_file() and rows.read_bytes()
            rows = hashlib.sha256(content).hexdigest()[:16] if content else str(rows)
        own = asdict(benchmark)
        for about_the_result in ("name", "title", "metric"):
            own.pop(about_the_result)
        described[benchmark.name] = {**common, **own, "rows": rows}
    # 2. What is not done yet
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TideError(
            f"{out} cannot be made: {error.strerror}", fix="give another --output"
        ) from error
    open_ones = [b for b in benchmarks if not finished(out, b, described[b.name])]
    if open_ones:
        with ExitStack() as held, code_eval_with_limits(settings.limits):
            tasks = [(b, _load(b, settings)) for b in open_ones]
            if os.environ.get("RANK", "0") == "0":
                held.enter_context(hold(out / ".lock", f"the evaluation in {out}"))
            _measure(student, tasks, settings, described, out)
    scores = {score.name: score for score in read_scores(out)}
    return [scores[b.name] for b in benchmarks if b.name in scores]


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


def _load(benchmark: Benchmark, settings: EvalSettings) -> Any:
    """lm-eval's task, or group, with its rows. TideError where it runs code without consent."""
    loaded = load_tasks(_task_manager(), benchmark, settings.data.get(benchmark.name))
    unsafe = any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values())
    if unsafe and not settings.run_code:
        raise TideError(
            f"{benchmark.name} runs the code that the student writes",
            expected="your consent",
            fix="add --confirm-run-unsafe-code: each program runs in a bubblewrap sandbox, which "
            "is no virtual machine (docs/benchmarks.md)",
        )
    return loaded["groups"].get(benchmark.task) or loaded["tasks"][benchmark.task]


@functools.cache
def _task_manager() -> Any:
    """lm-eval's tasks and ours. Reading its 14,000 files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(packaged("tasks")))


def _measure(
    student: str,
    tasks: list[tuple[Benchmark, Any]],
    settings: EvalSettings,
    described: dict[str, dict[str, Any]],
    out: Path,
) -> None:
    import lm_eval

    from pipelines.evaluation.model import TideBD3LM, join_processes

    loaded = load_for_use(student, join_processes(settings.device))
    rank = os.environ.get("RANK", "0")
    evaluate: Any = lm_eval.simple_evaluate
    for benchmark, task in tasks:
        name, started = benchmark.name, time.monotonic()
        answers = Answers(out / f".{name}-{digest(described[name])}_rank{rank}.jsonl")
        model = TideBD3LM(
            loaded,
            answers=answers,
            batch_size=settings.batch,
            max_new_tokens=benchmark.new_tokens,
            steps=benchmark.steps,
            **settings.sampling,
        )
        reported = evaluate(
            model=model,
            tasks=[task],
            num_fewshot=benchmark.shots,
            limit=settings.limit,
            apply_chat_template=benchmark.chat,
            fewshot_as_multiturn=benchmark.chat,
            confirm_run_unsafe_code=settings.run_code,
            bootstrap_iters=1000,
            task_manager=_task_manager(),
        )
        if reported is not None:  # in the first process alone
            seconds, cut = time.monotonic() - started, model.truncated
            save(out, benchmark, described[name], reported, seconds=seconds, prompts_cut=cut)
            if cut:
                logger.warning("%s: %d prompts lost their beginning, too long to fit", name, cut)
        model.barrier()
        answers.discard()
    shut_down_process_group()
