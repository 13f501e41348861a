"""What a person sees of a student, beside its held-out NLL: lines filled in, functions that parse, tokens a step.

A mode-seeking objective need not lower the NLL; what it buys may be speed at a confidence threshold, or text that holds
together. Held-out functions of the standard library, greedy, the same ones for every student.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from tqdm import tqdm

from shared.aligned.alignment import token_boundaries
from shared.data import ChatExample, iter_examples
from shared.diffusion.padding import pad
from shared.settings.config import DataConfig
from shared.system.atomic import write_bytes
from shared.system.files import read_json
from shared.system.signals import serve_parent
from student_train.batches.visible_rows import needed_places
from student_train.model.student import masked_hidden
from student_train.using.load import LoadedStudent, load_for_use
from student_train.using.settings import SampleConfig

USE = "use.json"
THRESHOLD = 0.5
"""Of confidence, above which a token is settled; models as small as the embedded ones are seldom surer than 0.9."""
_LINES, _FUNCTIONS = 160, 24
_LINE, _LONGEST, _LONGEST_FUNCTION = 16, 192, 160
"""Tokens of a line and of its conversation, characters of a function to be sampled."""
_BATCH, _BLOCKS = 32, 3
_MOST = 400
"""Functions among which lines and short ones are looked for."""


@dataclass(frozen=True)
class UseScores:
    """Shares of held-out lines completed exactly and of sampled functions that parse, and tokens settled a step."""

    lines: float
    parse: float
    tokens_per_step: float
    threshold: float


def score_use(model: str, threshold: float = THRESHOLD) -> UseScores:
    """Score the student in the folder `model`, settling what is surer than `threshold` at once."""
    student = load_for_use(model, "cpu")
    # By length, so that the lines of a batch take about as many steps.
    gaps = sorted(itertools.islice(_gaps(student), _LINES), key=lambda gap: len(gap.places))
    exact = tokens = steps = 0
    for start in range(0, len(gaps), _BATCH):
        part = gaps[start : start + _BATCH]
        for gap, (found, passes) in zip(part, _fill(student, part, threshold), strict=True):
            exact += found == gap.ids[gap.places].tolist()
            tokens, steps = tokens + len(found), steps + passes
    return UseScores(exact / len(gaps), _parsing(student, threshold), tokens / steps, threshold)


def score_all(runs: Sequence[Path], workers: int = 2) -> None:
    """Write `use.json` beside each run's `model`, where it is not there yet."""
    waiting = [run for run in runs if not (run / USE).exists()]
    if not waiting:
        return
    with (
        ProcessPoolExecutor(workers, get_context("spawn"), serve_parent, (os.getpid(),)) as pool,
        tqdm(total=len(waiting), unit="student", desc="score their use", dynamic_ncols=True) as bar,
    ):
        for _ in pool.map(_score_run, waiting):
            bar.update()


def read_use(run: Path) -> UseScores | None:
    """What `score_all` found of a run; None where it was not asked."""
    path = run / USE
    return UseScores(**read_json(path)) if path.exists() else None


def _score_run(run: Path) -> None:
    torch.set_num_threads(1)
    write_bytes(run / USE, (json.dumps(asdict(score_use(str(run / "model")))) + "\n").encode())


@lru_cache
def _heldout() -> tuple[ChatExample, ...]:
    """The first of the held-out functions, read once a process."""
    return tuple(itertools.islice(iter_examples(DataConfig("stdlib:heldout")), _MOST))


@dataclass(frozen=True)
class _Gap:
    """A conversation as in training, and the positions of one line of its answer."""

    ids: Int[np.ndarray, " length"]
    places: Int[np.ndarray, " line"]


def _gaps(student: LoadedStudent) -> Iterator[_Gap]:
    """One line a function, chosen by its hash: the whole tokens between two line breaks."""
    for chat in _heldout():
        text = str(chat.messages[-1]["content"])
        prompt = student.prompt(chat.messages[:-1])
        answer = np.array(student.tokenizer.encode([text])[0], np.int32)
        if len(prompt) + len(answer) > _LONGEST:
            continue
        edges = token_boundaries(student.tokenizer.byte_lengths[answer])
        rows = text.encode().split(b"\n")
        starts = np.cumsum([0, *(len(row) + 1 for row in rows)])
        inside = [
            np.flatnonzero((edges[:-1] >= at) & (edges[1:] <= at + len(row)))
            for at, row in zip(starts, rows)
        ]
        fit = [places for places in inside[1:] if 3 <= len(places) <= _LINE]
        if fit:
            places = fit[hashlib.sha256(text.encode()).digest()[1] % len(fit)]
            yield _Gap(np.concatenate([np.array(prompt, np.int32), answer]), places + len(prompt))


@torch.no_grad()
def _fill(
    student: LoadedStudent, gaps: Sequence[_Gap], threshold: float
) -> list[tuple[list[int], int]]:
    """What the student puts in each gap, the rest of the text given, and the steps that it took."""
    block = student.block or 32
    clean, _ = pad([gap.ids for gap in gaps])
    row = torch.from_numpy(np.repeat(np.arange(len(gaps)), [len(gap.places) for gap in gaps]))
    column = torch.from_numpy(np.concatenate([gap.places for gap in gaps])).long()
    places, place = needed_places(
        [gap.places for gap in gaps], [len(gap.ids) for gap in gaps], block
    )
    noised = clean.clone()
    noised[row, column] = student.special.mask
    open_, steps = torch.ones(len(row), dtype=torch.bool), torch.zeros(len(gaps), dtype=torch.long)
    while open_.any():
        steps[row[open_].unique()] += 1
        hidden = masked_hidden(student.model, noised, clean, places, row, place, block)
        confidence, tokens = student.model.lm_head(hidden).float().softmax(dim=1).max(dim=1)
        confidence = confidence.where(open_, -1.0)
        best = torch.full((len(gaps),), -1.0).scatter_reduce(0, row, confidence, "amax")
        settled = open_ & ((confidence > threshold) | (confidence == best[row]))
        noised[row[settled], column[settled]] = tokens[settled]
        open_ &= ~settled
    found = noised[row, column].split([len(gap.places) for gap in gaps])
    return [(ids.tolist(), n) for ids, n in zip(found, steps.tolist(), strict=True)]


def _parsing(student: LoadedStudent, threshold: float) -> float:
    """The share of short held-out functions, asked for by name, for which what is sampled is a function that parses."""
    chats = (c for c in _heldout() if len(str(c.messages[-1]["content"])) <= _LONGEST_FUNCTION)
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
