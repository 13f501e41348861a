"""Preparing data: rows a second by the number of processes, again when all is there, and what a draw costs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from pipelines.recipes.read import cache_config
from shared.cache.shards import Unit
from shared.data import iter_examples
from shared.settings.config import CacheConfig, DataConfig
from shared.system.hardware import largest_process
from teacher_cache.run.open import Run, open_or_begin, open_sides, prepare_data
from teacher_cache.run.work import prepare_unit

_ROWS = 16_000


def bench_preparing(rows: int = _ROWS) -> Table:
    """The rates as a table; `rows` functions of the standard library, as JSONL, in a cross-tokenizer setting."""
    with tempfile.TemporaryDirectory(prefix="tide-bench-") as name:
        folder = Path(name)
        source = folder / "rows.jsonl"
        examples = itertools.islice(
            itertools.cycle(iter_examples(DataConfig("stdlib:heldout"))), rows
        )
        with source.open("w") as file:
            for number, example in enumerate(examples):  # every row is another one
                first, answer = example.messages
                chat = [{**first, "content": f"{number}: {first['content']}"}, answer]
                file.write(json.dumps({"messages": chat}) + "\n")
        return _measure(folder, source, rows)


def _measure(folder: Path, source: Path, rows: int) -> Table:
    def config(workers: int) -> CacheConfig:
        changes = [
            "lengths={student=512, teacher=1024}",
            f"prepare_workers={workers}",
            f"data={{source={json.dumps(str(source))}}}",
        ]
        prepared = folder / str(workers)
        return cache_config("tiny-cross", None, changes, out=folder / "cache", prepared=prepared)

    table = Table(
        "preparing",
        "rows a second",
        title=f"{rows:,} rows, student 512 and teacher 1,024 tokens at most",
    )
    for workers in (1, 2):
        settings = config(workers)
        table.add_row(
            f"{workers} process{'es' * (workers > 1)}", _rate(rows, lambda c=settings: _prepare(c))
        )
    table.add_row("found again, nothing to prepare", _rate(rows, lambda: _prepare(config(1))))
    plan = open_or_begin(dataclasses.replace(config(1), shard_examples=rows))
    table.add_row(
        "a draw: ids read, time, mask and split drawn", _rate(rows, lambda: _draw(plan, rows))
    )
    table.add_row("peak memory of the largest process, MiB", f"{largest_process() / 2**20:,.0f}")
    return table


def _prepare(config: CacheConfig) -> None:
    prepare_data(config, open_sides(config))


def _draw(plan: Run, rows: int) -> None:
    prepare_unit(plan, Unit(0, 0), plan.data.between(0, rows))


def _rate(rows: int, job: Callable[[], None]) -> str:
    started = time.perf_counter()
    job()
    return f"{rows / (time.perf_counter() - started):,.0f}"
