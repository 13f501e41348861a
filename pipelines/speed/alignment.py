"""How fast text becomes chunks: examples of 512 tokens a second, in one process and in two worker processes."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from rich.table import Table

from shared.aligned.alignment import Region, align_tokens
from shared.aligned.examples import Preparer
from shared.data import ChatExample, iter_examples
from shared.models.checkpoint import resolve
from shared.settings.config import DataConfig, LengthConfig
from shared.text.tokenizers import Tokenizer
from teacher_cache.teachers.registry import find_teacher

_TOKENS = 512
_EXAMPLES = 1000
_BATCH = 125


class _Work:
    """What one process holds: tokenizers, texts of 512 student tokens, and their tokens' lengths in bytes."""

    def __init__(self) -> None:
        entry = find_teacher("tiny-cross")
        self.student, self.teacher = (
            Tokenizer.load(resolve(entry.student)),
            Tokenizer.load(resolve(entry.model)),
        )
        text = "\n\n".join(
            e.messages[-1]["content"] for e in iter_examples(DataConfig("stdlib:train", limit=4000))
        )
        ids = self.student.encode([text])[0]
        size = len(text) * _TOKENS // len(ids)
        self.texts = [text[i : i + size] for i in range(0, _EXAMPLES * size, size)]
        texts = self.texts[:_BATCH]
        self.lengths = [
            (len(text.encode()), self.teacher.byte_lengths[t], self.student.byte_lengths[s])
            for text, t, s in zip(
                texts, self.teacher.encode(texts), self.student.encode(texts), strict=True
            )
        ]
        self.mask = self.student.special_id("mask")

    def align(self, _: int) -> int:
        """Chunks of a batch whose tokens are known."""
        return sum(len(align_tokens(t, s, [Region(0, 0, n)])) for n, t, s in self.lengths)

    def prepare(self, number: int) -> int:
        """Chunks of a batch from its texts: templates, both tokenisers, alignment."""
        preparer = Preparer(self.student, self.teacher, LengthConfig(1024, 4096), self.mask, 4095)
        texts = self.texts[number * _BATCH : (number + 1) * _BATCH]
        chats = [
            ({"role": "user", "content": "Go."}, {"role": "assistant", "content": text})
            for text in texts
        ]
        return sum(
            len(p.chunks)
            for p in preparer.usable([ChatExample(str(i), c) for i, c in enumerate(chats)])
        )


_work: _Work | None = None


def _start() -> None:
    global _work  # noqa: PLW0603 - a worker process has one set of texts for its whole life
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _work = _Work()


def _align(number: int) -> int:
    assert _work is not None
    return _work.align(number)


def _prepare(number: int) -> int:
    assert _work is not None
    return _work.prepare(number)


def bench_alignment() -> Table:
    """The rates as a table. One process means one core: tokenizers run on one thread here."""
    table = Table(
        "examples of 512 tokens a second", "1 process", "2 processes", title="Tokenise and align"
    )
    rates: dict[str, list[float]] = {
        "alignment alone": [],
        "templates, both tokenisers, alignment": [],
    }
    for workers in (1, 2):
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start) as pool:
            list(pool.map(_prepare, range(2 * workers)))  # every process is up
            for label, job, repeats in zip(rates, (_align, _prepare), (5, 1), strict=True):
                rates[label].append(_rate(pool, job, repeats))
    for label, values in rates.items():
        table.add_row(label, *(f"{value:,.0f}" for value in values))
    return table


def _rate(pool: ProcessPoolExecutor, job: Callable[[int], int], repeats: int) -> float:
    batches = list(range(_EXAMPLES // _BATCH)) * repeats
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        list(pool.map(job, batches))
        seconds.append(time.perf_counter() - started)
    return len(batches) * _BATCH / float(np.median(seconds))
