"""What a person sees of a student, beside its held-out NLL: lines completed, functions that parse, tokens a step.

A mode-seeking objective need not lower the NLL; what it buys may be speed at a confidence threshold, or text that holds
together. Held-out functions of the standard library, greedy, the same ones for every student.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from shared.atomic import write_bytes
from shared.config import DataConfig
from shared.data import ChatExample, iter_examples
from student_train.using.load import LoadedStudent, load_for_use
from student_train.using.sampler import SampleConfig, sample_steps

USE = "use.json"
_LINES, _FUNCTIONS = 192, 32
_LONGEST_LINE, _LONGEST_FUNCTION = 60, 200
"""Characters of what is asked for, so that a block, or four of them, can hold it in either tokenizer."""
_BATCH, _BLOCKS = 64, 4


@dataclass(frozen=True)
class UseScores:
    """Shares of held-out lines completed exactly and of sampled functions that parse, and tokens settled a step."""

    lines: float
    parse: float
    tokens_per_step: float
    threshold: float


def score_use(model: str, threshold: float = 0.9) -> UseScores:
    """Score the student in the folder `model`, settling what is surer than `threshold` at once."""
    student = load_for_use(model, "cpu")
    lines = [(context, line) for context, line in _lines(student)]
    exact, tokens, steps = 0, 0, 0
    for found, passes, (_, line) in zip(*_complete(student, [c for c, _ in lines], threshold), lines, strict=True):
        exact += student.text(found).partition("\n")[0].rstrip() == line
        tokens, steps = tokens + len(found), steps + passes
    return UseScores(exact / len(lines), _parsing(student, threshold), tokens / steps, threshold)


def score_all(runs: Sequence[Path], workers: int = 2) -> None:
    """Write `use.json` beside each run's `model`, where it is not there yet."""
    waiting = [run for run in runs if not (run / USE).exists()]
    if not waiting:
        return
    with (
        ProcessPoolExecutor(workers, get_context("spawn")) as pool,
        tqdm(total=len(waiting), unit="student", desc="score their use", dynamic_ncols=True) as bar,
    ):
        for _ in pool.map(_score_run, waiting):
            bar.update()


def read_use(run: Path) -> UseScores | None:
    """What `score_all` found of a run; None where it was not asked."""
    path = run / USE
    return UseScores(**json.loads(path.read_text())) if path.exists() else None


def _score_run(run: Path) -> None:
    torch.set_num_threads(1)
    write_bytes(run / USE, (json.dumps(asdict(score_use(str(run / "model")))) + "\n").encode())


def _heldout() -> Iterator[ChatExample]:
    return iter_examples(DataConfig("stdlib:heldout"))


def _lines(student: LoadedStudent) -> Iterator[tuple[list[int], str]]:
    """The true text up to a line of a function's body, and that line; one line a function, chosen by its hash."""

    def every() -> Iterator[tuple[list[int], str]]:
        for chat in _heldout():
            text = str(chat.messages[-1]["content"])
            rows = text.split("\n")
            fit = [i for i, row in enumerate(rows) if i and len(row.strip()) >= 8 and len(row) <= _LONGEST_LINE]
            if not fit:
                continue
            i = fit[hashlib.sha256(text.encode()).digest()[1] % len(fit)]
            before = "\n".join(rows[:i]) + "\n"
            ids = student.prompt(chat.messages[:-1]) + student.tokenizer.encode([before])[0]
            if len(ids) <= 256:
                yield ids, rows[i].rstrip()

    return itertools.islice(every(), _LINES)


def _complete(
    student: LoadedStudent, contexts: Sequence[list[int]], threshold: float
) -> tuple[list[list[int]], list[int]]:
    """One block after each context, and the steps that each took."""
    block = student.block or 32
    config = SampleConfig(new_tokens=block, min_new_tokens=block, block=block, threshold=threshold)
    found: list[list[int]] = []
    steps: list[int] = []
    for start in range(0, len(contexts), _BATCH):
        part = contexts[start : start + _BATCH]
        own = [0] * len(part)
        open_ = [True] * len(part)
        tokens = torch.zeros(0)
        for tokens, _ in sample_steps(student.model, part, student.special, config):
            own = [n + going for n, going in zip(own, open_, strict=True)]
            open_ = (tokens == student.special.mask).any(dim=1).tolist()
        found += tokens.tolist()
        steps += own
    return found, steps


def _parsing(student: LoadedStudent, threshold: float) -> float:
    """The share of short held-out functions, asked for by name, for which what is sampled is a function that parses."""
    chats = [c for c in _heldout() if len(str(c.messages[-1]["content"])) <= _LONGEST_FUNCTION]
    chosen = [list(chat.messages[:-1]) for chat in itertools.islice(chats, _FUNCTIONS)]
    block = student.block or 32
    config = SampleConfig(new_tokens=_BLOCKS * block, block=block, threshold=threshold)
    good = [_is_function(text) for text in student.answer(chosen, config, _BATCH)]
    return sum(good) / len(good)


def _is_function(text: str) -> bool:
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return len(body) == 1 and isinstance(body[0], ast.FunctionDef | ast.AsyncFunctionDef)
