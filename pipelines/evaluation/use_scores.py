"""What a person sees of a student, beside its held-out NLL: lines filled in, functions that parse,
tokens a step. Held-out functions of the standard library, greedy, the same for every student.
"""

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
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from tqdm.auto import tqdm

from shared.aligned.alignment import token_boundaries
from shared.data.conversation import ChatExample
from shared.data.reading import iter_examples
from shared.diffusion import pad
from shared.settings.config import DataConfig
from shared.system.files import read_json, write_bytes
from shared.system.processes import serve_parent
from student_train.batches.collate import places_of_draws
from student_train.model import masked_hidden
from student_train.using.settings import SampleConfig
from student_train.using.student import LoadedStudent, load_for_use

USE = "use.json"
THRESHOLD = 0.5  # of confidence, above which a token is settled; tiny models are seldom above 0.9
_LINES, _FUNCTIONS = 160, 24
_LINE, _LONGEST = 16, 192  # tokens of a line, and of its conversation
_LONGEST_FUNCTION = 160  # characters of a function to be sampled
_BATCH = 32


@dataclass(frozen=True)
class UseScores:
    """Shares of lines completed exactly and of functions that parse; tokens settled a step."""

    lines: float
    parse: float
    tokens_per_step: float
    threshold: float


def score_use(model: str, threshold: float = THRESHOLD) -> UseScores:
    """Score the student in the folder `model`, settling what is surer than `threshold` at once."""
    student = load_for_use(model, "cpu")
    # By length, so that the lines of a batch take about as many steps.
    gaps = sorted(itertools.islice(gaps_of(student), _LINES), key=lambda gap: len(gap.places))
    exact = tokens = steps = 0
    for start in range(0, len(gaps), _BATCH):
        batch = gaps[start : start + _BATCH]
        for gap, (ids, passes) in zip(batch, fill(student, batch, threshold), strict=True):
            exact += ids == gap.ids[gap.places].tolist()
            tokens, steps = tokens + len(ids), steps + passes
    # The share of short functions, asked for by name, for which a function that parses is sampled
    longest = _LONGEST_FUNCTION
    short = [c for c in heldout_functions() if len(str(c.messages[-1]["content"])) <= longest]
    chats = [list(chat.messages[:-1]) for chat in short[:_FUNCTIONS]]
    block = student.block or 32
    config = SampleConfig(new_tokens=3 * block, block=block, threshold=threshold)
    parsed = [is_function(text) for text in student.answer(chats, config, _BATCH)]
    return UseScores(exact / len(gaps), sum(parsed) / len(parsed), tokens / steps, threshold)


def score_all(runs: Sequence[Path], workers: int = 2) -> None:
    """Write `use.json` beside each run's `model`, where it is not there yet."""
    waiting = [run for run in runs if not (run / USE).exists()]
    if not waiting:
        return
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, serve_parent, (os.getpid(),)) as pool:
        scored = pool.map(_score_run, waiting)
        list(tqdm(scored, "score their use", len(waiting), unit="student", dynamic_ncols=True))


def _score_run(run: Path) -> None:
    torch.set_num_threads(1)
    write_bytes(run / USE, (json.dumps(asdict(score_use(str(run / "model")))) + "\n").encode())


def read_use(run: Path) -> UseScores | None:
    """What `score_all` found of a run; None where it was not asked."""
    path = run / USE
    return UseScores(**read_json(path)) if path.exists() else None


@lru_cache
def heldout_functions() -> list[ChatExample]:
    """The first 400, among which lines and short functions are looked for."""
    return list(itertools.islice(iter_examples(DataConfig("stdlib:heldout")), 400))


class Gap(NamedTuple):
    """A conversation as in training, and the positions of one line of its answer."""

    ids: Int[np.ndarray, " length"]
    places: Int[np.ndarray, " line"]


def gaps_of(student: LoadedStudent) -> Iterator[Gap]:
    """One line a function, chosen by its hash: the whole tokens between two line breaks."""
    for chat in heldout_functions():
        text = str(chat.messages[-1]["content"])
        prompt = student.tokenizer.encode_prompt(chat.messages[:-1])
        answer = np.array(student.tokenizer.encode([text])[0], np.int32)
        if len(prompt) + len(answer) > _LONGEST:
            continue
        edges = token_boundaries(student.tokenizer.byte_lengths[answer])
        lines, start = [], 0
        for row in text.encode().split(b"\n"):
            end = start + len(row)
            places = np.flatnonzero((edges[:-1] >= start) & (edges[1:] <= end))
            if start > 0 and 3 <= len(places) <= _LINE:
                lines.append(places)
            start = end + 1
        if lines:
            places = lines[hashlib.sha256(text.encode()).digest()[1] % len(lines)]
            yield Gap(np.concatenate([np.array(prompt, np.int32), answer]), places + len(prompt))


@torch.no_grad()
def fill(
    student: LoadedStudent, gaps: Sequence[Gap], threshold: float
) -> list[tuple[list[int], int]]:
    """What the student puts in each gap, the rest of the text given, and the steps it took."""
    block = student.block or 32
    lengths = [len(gap.places) for gap in gaps]
    clean, _ = pad([gap.ids for gap in gaps])
    # 1. For every masked position: its gap and its column
    row = torch.from_numpy(np.repeat(np.arange(len(gaps)), lengths))
    column = torch.from_numpy(np.concatenate([gap.places for gap in gaps])).long()
    places, place = places_of_draws(
        [[gap.places] for gap in gaps], [len(gap.ids) for gap in gaps], block
    )
    noised = clean.clone()
    noised[row, column] = student.special.mask
    masked = torch.ones(len(row), dtype=torch.bool)
    steps = torch.zeros(len(gaps), dtype=torch.long)
    while masked.any():
        steps[row[masked].unique()] += 1
        # 2. The likeliest token of each position that is still masked
        hidden = masked_hidden(student.model, noised, clean, places, place, block)
        confidence, tokens = student.model.lm_head(hidden).float().softmax(dim=1).max(dim=1)
        confidence = confidence.where(masked, -1.0)
        # 3. Settle those above the threshold, and in each gap the surest
        best = torch.full((len(gaps),), -1.0).scatter_reduce(0, row, confidence, "amax")
        settled = masked & ((confidence > threshold) | (confidence == best[row]))
        noised[row[settled], column[settled]] = tokens[settled]
        masked &= ~settled
    filled = noised[row, column].split(lengths)
    return [(ids.tolist(), count) for ids, count in zip(filled, steps.tolist(), strict=True)]


def is_function(text: str) -> bool:
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return len(body) == 1 and isinstance(body[0], ast.FunctionDef | ast.AsyncFunctionDef)
