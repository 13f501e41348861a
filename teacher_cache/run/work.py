"""The units of a run: examples made into requests for the engine, its scores made into rows of the
cache, and the pipeline around both. Units are drawn ahead of the engine and written behind it, in
threads, so that it never waits.
"""

import os
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shared.aligned.examples import Prepared
from shared.cache.ledger import Entry, note
from shared.cache.row import CacheRow
from shared.cache.shards import CACHE, Unit, write_shard
from shared.diffusion import Draw
from shared.models.loading import load_model
from shared.settings.config import EngineConfig
from shared.system.hardware import choose_device, torch_dtype
from teacher_cache import method
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.engines.vllm_engine import VllmEngine, field_shapes
from teacher_cache.method import Request, Scores, TargetSpec, TeacherView
from teacher_cache.run.open import Run
from teacher_cache.run.progress import Progress
from teacher_cache.teachers.registry import Full

Engine = TransformersEngine | VllmEngine
_AHEAD = 2  # groups of units in memory before the engine asks for them


def load_engine(run: Run) -> Engine:
    """The run's engine, with the teacher, and the run's tables where it has them."""
    settings, entry, spec = run.config.engine, run.entry, run.target_spec()
    shared = run.shared and run.shared.same
    if settings.type == "vllm":
        longest = run.config.lengths.teacher
        engine: Engine = VllmEngine(run.checkpoint, entry, spec, settings, longest, shared)
    else:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # fewer gaps
        device, dtype = choose_device(settings.device), torch_dtype(settings.dtype)
        fit: Any = {"device_map": settings.device_map, "quantization": settings.quantization}
        model = load_model(run.checkpoint, entry.architecture, dtype, device, **fit)
        engine = TransformersEngine(
            model, entry.attention, spec, shift=entry.shift, shared_ids=shared,
            tokens_per_batch=settings.tokens_per_batch, head_rows=settings.head_rows,
            compiled=compiles(settings, device),
        )  # fmt: skip
    if run.tables is not None:
        engine.use_tables(run.tables)
    return engine


def compiles(settings: EngineConfig, device: torch.device) -> bool:
    """Whether layers are compiled; `auto`: on CUDA, with all layers on one GPU."""
    if settings.compile != "auto":
        return settings.compile == "on"
    return device.type == "cuda" and settings.device_map is None and settings.quantization is None


@dataclass(frozen=True)
class Item:
    """One example under one draw. Its i-th request reads the rows `rows[i]` of `view`."""

    example: Prepared
    draw: Draw
    view: TeacherView
    rows: list[np.ndarray]


@dataclass(frozen=True)
class UnitWork:
    """All that the engine must score for one shard, and what its answers belong to."""

    unit: Unit
    items: list[Item]
    requests: list[Request]


def prepare_unit(run: Run, unit: Unit, examples: Sequence[Prepared]) -> UnitWork:
    """Draw and split: everything before the engine."""
    items, requests = [], []
    for example in examples:
        draw = method.draw_for(example, run.config.noise, unit.draw)
        view = method.teacher_view(example, draw)
        pairs = method.passes(view, run.entry.mask_id, run.config.noise.comp_demo)
        requests += [request for request, _ in pairs]
        items.append(Item(example, draw, view, [rows for _, rows in pairs]))
    return UnitWork(unit, items, requests)


def finish_unit(
    run: Run, work: UnitWork, scores: Sequence[Scores]
) -> tuple[list[CacheRow], dict[str, Any]]:
    """Rows of the shard, and the counts stored with it. TideError where a score is not finite."""
    spec, signals, partial = run.target_spec(), run.config.targets.signals, run.layout.partial
    comp_demo, remaining, rows = run.config.noise.comp_demo, iter(scores), []
    chunks = without_chunks = 0
    for item in work.items:
        parts = [next(remaining) for _ in item.rows]
        for part in parts:
            method.refuse_nonfinite(part, item.example.id)
        merged = merge_passes(spec, item.view.positions.size, parts, item.rows)
        row = cache_row(item, work.unit.draw, merged, signals, comp_demo, partial)
        if row.chunk_logp is not None:
            chunks += row.chunk_logp.size
            without_chunks += bool(row.masked.size and not row.chunk_logp.size)
        rows.append(row)
    counts = {
        "rows_without_chunks": without_chunks, "masked": sum(row.masked.size for row in rows),
        "chunks": chunks, "draw": work.unit.draw, "part": work.unit.part,
        CACHE: run.manifest.digest,
    }  # fmt: skip
    return rows, counts


def merge_passes(
    spec: TargetSpec, n: int, parts: Sequence[Scores], rows_of: Sequence[np.ndarray]
) -> Scores:
    """The rows of several passes in the order of the `n` positions; pass i read `rows_of[i]`."""
    merged = {name: np.zeros((n, *s), kind) for name, (s, kind) in field_shapes(spec).items()}
    for scores, rows in zip(parts, rows_of, strict=True):
        for name, values in merged.items():
            values[rows] = scores[name]
    return merged


def cache_row(
    item: Item, number: int, scores: Scores, signals: Sequence[str], comp: bool, partial: bool
) -> CacheRow:
    """The row of draw `number` of an example, from what the teacher said of its view. `comp`: under
    CompDemo. `partial`: the teacher may be read at fewer positions than are masked.
    """
    example, draw, view = item.example, item.draw, item.view
    chunk_student = chunk_teacher = chunk_logp = None
    if "chunks" in signals:
        if view.student is not None:  # every masked token that the teacher reads is a chunk
            chunk_student = np.stack([view.student, view.student + 1], axis=1)
            chunk_teacher = np.stack([view.positions, view.positions + 1], axis=1)
        else:
            chunk_teacher = example.chunks[draw.chunks, :2]
            chunk_student = example.chunks[draw.chunks, 2:]
        # log p(c) = Σ over the chunk's tokens of log p(gold)
        sums = np.bincount(view.chunk_of, scores["gold_logp"], minlength=len(chunk_student))
        chunk_logp = sums.astype(np.float32)
    kept = dict(scores)
    if "topk_sizes" in kept:  # lists of their own lengths, end to end
        own = np.arange(kept["topk_ids"].shape[1]) < kept["topk_sizes"][:, None]
        kept |= {name: kept[name][own] for name in ("topk_ids", "topk_logp")}
    return CacheRow(
        example_id=example.id, label=example.label, draw=number, t=draw.t,
        student_ids=example.student_ids, spans=example.spans, masked=draw.masked,
        read=view.student if partial else None, teacher_ids=example.teacher_ids,
        teacher_masked=None if example.teacher_ids is None else view.positions,
        split=view.in_a if comp else np.zeros_like(view.in_a),
        chunk_student=chunk_student, chunk_teacher=chunk_teacher, chunk_logp=chunk_logp, **kept,
    )  # fmt: skip


def examples_of(run: Run, unit: Unit) -> list[Prepared]:
    size = run.config.shard_examples
    return run.data.between(unit.part * size, (unit.part + 1) * size)


def run_units(run: Run, engine: Engine, units: Sequence[Unit]) -> None:
    """Score `units` and write a shard for each; also what was scored before a failure or Ctrl-C."""
    # Where passes share a clean copy (`engines.packs`), all draws of a part are scored together.
    alone = isinstance(run.entry.attention, Full)
    together: dict[Unit | int, list[Unit]] = {}
    for unit in units:
        together.setdefault(unit if alone else unit.part, []).append(unit)
    groups = iter(together.values())

    def draw() -> list[UnitWork] | None:
        group = next(groups, None)
        if group is None:
            return None
        examples = examples_of(run, group[0])
        return [prepare_unit(run, unit, examples) for unit in group]

    def write(work: UnitWork, scores: Sequence[Scores]) -> None:
        rows, counts = finish_unit(run, work, scores)
        content = write_shard(work.unit.path(run.config.out), rows, run.layout, counts)
        note(run.config.out, work.unit, Entry.of(content, {**counts, "rows": len(rows)}))

    pending: deque[tuple[UnitWork, float, Future[None]]] = deque()
    with (
        Progress(run, units) as progress,
        ThreadPoolExecutor(1, "draw") as drawer,
        ThreadPoolExecutor(1, "write") as writer,
    ):

        def settle(most: int) -> None:
            while len(pending) > most:
                work, busy_seconds, written = pending.popleft()
                written.result()
                progress.wrote(work.unit, len(work.items), busy_seconds)

        drawn = deque(drawer.submit(draw) for _ in range(_AHEAD))
        try:
            while (works := drawn.popleft().result()) is not None:
                drawn.append(drawer.submit(draw))
                begun = time.perf_counter()
                scores = iter(engine.score([each for work in works for each in work.requests]))
                own = [[next(scores) for _ in work.requests] for work in works]
                busy_seconds = (time.perf_counter() - begun) / len(works)
                for work, of_work in zip(works, own, strict=True):
                    pending.append((work, busy_seconds, writer.submit(write, work, of_work)))
                settle(len(works))
        finally:
            settle(0)
