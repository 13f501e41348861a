"""`tide eval`: a student on benchmarks. Finished ones are kept; an interrupted one goes on."""

import contextlib
import functools
import hashlib
import io
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from pipelines.evaluation import benchmarks as bench
from pipelines.evaluation.benchmarks import Answers, Benchmark, Score
from pipelines.evaluation.sandbox import Limits, run_program
from shared.models.checkpoint import open_checkpoint, resolve
from shared.system.files import TideError, explained, write_bytes
from shared.system.hardware import choose_device, shut_down_process_group
from shared.system.processes import hold
from student_train.using.student import load_for_use

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalSettings:
    """How to ask, for all benchmarks. `sampling`: arguments of `tide_bd3lm`."""

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
    names = [benchmark.name for benchmark in benchmarks]
    if unknown := ", ".join(set(settings.data).difference(names)):
        raise TideError(f"--data names {unknown}", expected=f"some of {', '.join(names)}")
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
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    open_ones = [b for b in benchmarks if not _finished(out, b, described[b.name])]
    if open_ones:
        with contextlib.ExitStack() as held, code_eval_with_limits(settings.limits):
            tasks = [(b, _load(b, settings)) for b in open_ones]
            if os.environ.get("RANK", "0") == "0":
                held.enter_context(hold(out / ".lock", f"the evaluation in {out}"))
            _measure(student, tasks, settings, described, out)
    scores = {score.name: score for score in bench.read_scores(out)}
    return [scores[name] for name in names if name in scores]


def default_output(student: str) -> Path:
    """Beside a run's model; for anything else below runs/."""
    folder = Path(resolve(student))
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


def _finished(out: Path, benchmark: Benchmark, settings: dict[str, Any]) -> bool:
    """Whether it is done. TideError, with what differs, where it was done with other settings."""
    path = out / f"{benchmark.name}.json"
    if not path.exists():
        return False
    there = bench.read_result(path).get("settings", {})
    keys = sorted(there.keys() | settings.keys())
    pairs = [(key, there.get(key), settings.get(key)) for key in keys]
    lines = [f"{key}: {old!r} there, {new!r} now" for key, old, new in pairs if old != new]
    if lines:
        what = "\n    ".join([f"{path} holds a result with other settings:", *lines])
        raise TideError(what, fix="give another --output, or delete that file to measure again")
    return True


@functools.cache
def _task_manager() -> Any:
    """lm-eval's tasks and ours. Reading its 14,000 files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(bench.HERE / "tasks"))


def _load(benchmark: Benchmark, settings: EvalSettings) -> Any:
    """lm-eval's task, or group, with its rows. TideError where it runs code without consent."""
    from lm_eval.tasks._factory import TaskFactory

    manager = _task_manager()
    name, index = benchmark.task, manager.task_index
    if name not in manager.all_tasks:
        expected = "a benchmark of the recipe, or a task that `tide lm-eval ls tasks` lists"
        raise TideError(f"lm-eval has no task {name!r}", expected=expected)
    if name in manager.all_tags:
        members = ",".join(sorted(index[name].tags))
        raise TideError(f"{name} is a tag and has no score of its own", fix=f"--tasks {members}")
    place = settings.data.get(benchmark.name)
    changes = {**benchmark.overrides, **(bench.local_rows(place) if place else {})}
    datasets_log = logging.getLogger("datasets")
    level = datasets_log.level
    datasets_log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            # The manager's own `load` hands a group's changes to none of its members.
            built = TaskFactory().build(index[name], overrides=changes or None, registry=index)
            loaded = manager.load([built])
    except TideError:
        raise
    except Exception as error:  # whatever datasets, the hub and the task's own code raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        what = f"the rows of {benchmark.name} cannot be read: {first}"
        fix = f"give --data {benchmark.name}=PATH: a JSONL or Parquet file, or a folder"
        expected = "network access, a cached copy of the data set, or files of your own"
        raise TideError(what, expected=expected, fix=fix) from error
    finally:
        datasets_log.setLevel(level)
    unsafe = any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values())
    if unsafe and not settings.run_code:
        what = f"{benchmark.name} runs the code that the student writes"
        fix = "--confirm-run-unsafe-code; it runs in bubblewrap, no virtual machine"
        raise TideError(what, expected="your consent", fix=fix)
    return loaded["groups"].get(name) or loaded["tasks"][name]


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
        unfinished = out / f".{name}-{bench.digest(described[name])}_rank{rank}.jsonl"
        model = TideBD3LM(
            loaded, answers=Answers(unfinished), batch_size=settings.batch,
            max_new_tokens=benchmark.new_tokens, steps=benchmark.steps, **settings.sampling,
        )  # fmt: skip
        reported = evaluate(
            model=model, tasks=[task], task_manager=_task_manager(), num_fewshot=benchmark.shots,
            limit=settings.limit, apply_chat_template=benchmark.chat,
            fewshot_as_multiturn=benchmark.chat, confirm_run_unsafe_code=settings.run_code,
            bootstrap_iters=1000,
        )  # fmt: skip
        if reported is not None:  # in the first process alone
            seconds, cut = time.monotonic() - started, model.truncated
            about = {"seconds": seconds, "prompts_cut": cut, "settings": described[name]}
            _save(out, benchmark, reported, about)
            if cut:
                logger.warning("%s: %d prompts lost their beginning, too long to fit", name, cut)
        model.barrier()
        unfinished.unlink(missing_ok=True)
    shut_down_process_group()


def _save(out: Path, benchmark: Benchmark, reported: dict[str, Any], about: dict[str, Any]) -> None:
    """Write a benchmark's answers, then its result with `about` in it, each whole or not at all.

    `reported` is what lm-eval returns. TideError where it lacks the benchmark's metric.
    """
    rows = [{"task": task, **row} for task, rows in reported["samples"].items() for row in rows]
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    write_bytes(out / f"{benchmark.name}.samples.jsonl", text.encode())
    measured = reported["results"].get(benchmark.task, {})
    metrics = []
    for key, value in measured.items():
        if "," in key and "_stderr," not in key and isinstance(value, int | float):
            metrics.append(key)
    metric = benchmark.metric or next(iter(metrics), None)
    if metric is None or metric not in metrics:
        what = f"{benchmark.task} reports no {metric or 'score'}; its answers are kept in {out}"
        fix = f"name one as `metric` of [{benchmark.name}] in the recipe, or name a group's tasks"
        raise TideError(what, expected=f"one of its metrics: {', '.join(metrics)}", fix=fix)
    error = measured.get("_stderr,".join(metric.split(",", 1)))
    result = {
        "name": benchmark.name, "title": benchmark.title, "metric": metric,
        "value": float(measured[metric]),
        "error": float(error) if isinstance(error, float) else None,
        "rows": len({(row["task"], row["doc_id"]) for row in rows}),
        **about, "results": reported["results"],
    }  # fmt: skip
    content = json.dumps(result, indent=1, ensure_ascii=False, default=str)
    write_bytes(out / f"{benchmark.name}.json", content.encode())


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that one of k samples, drawn from `samples`, passes (Chen et al. 2021, eq. 1)."""
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


@dataclass(frozen=True)
class CodeEval:
    """Stands in for the hub's metric `code_eval`: the same call and scores, and no download."""

    limits: Limits

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
    ) -> tuple[dict[str, float], list[list[str]]]:
        """pass@k over the problems, and each program's verdict: `predictions[i]` by its test."""
        running = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for test, programs in zip(references, predictions, strict=True):
                run = functools.partial(run_program, limits=self.limits, test=str(test))
                running.append(pool.map(run, programs))
            verdicts = [list(of_problem) for of_problem in running]
        scores = {}
        for n in k:
            if all(len(of_problem) >= n for of_problem in verdicts):
                chances = [pass_at_k(len(v), v.count("passed"), n) for v in verdicts]
                scores[f"pass@{n}"] = sum(chances) / len(chances)
        return scores, verdicts


@contextlib.contextmanager
def code_eval_with_limits(limits: Limits) -> Iterator[None]:
    """lm-eval's tasks load the metric `code_eval` from the hub on import; here they get ours."""
    import evaluate

    hub = evaluate.load

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        return CodeEval(limits) if path == "code_eval" else hub(path, *arguments, **options)

    with mock.patch.object(evaluate, "load", load):
        yield
