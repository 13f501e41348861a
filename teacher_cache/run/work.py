"""The units of a run: examples made into requests for the engine, its scores made into rows of the
cache, and the pipeline around both. Units are drawn ahead of the engine and written behind it, so
that it never waits; both run in threads, as most of NumPy and Parquet releases the interpreter's
lock.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.aligned.examples import Prepared
from shared.cache.ledger import Entry, note
from shared.cache.row import CacheRow
from shared.cache.shards import CACHE, Unit, write_shard
from shared.diffusion.noise import Draw
from teacher_cache.engines.base import Engine
from teacher_cache.method.comp_demo import Request, TeacherView, draw_for, passes, teacher_view
from teacher_cache.method.targets import Scores, TargetSpec, refuse_nonfinite
from teacher_cache.run.open import Run
from teacher_cache.run.progress import Progress
from teacher_cache.teachers.registry import Full

_AHEAD = 2  # groups of units in memory before the engine asks for them


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
    examples: int
    items: list[Item]
    requests: list[Request]


def prepare_unit(run: Run, unit: Unit, examples: Sequence[Prepared]) -> UnitWork:
    """Draw and split: everything before the engine."""
    items, requests = [], []
    for example in examples:
        draw = draw_for(example, run.config.noise, unit.draw)
        view = teacher_view(example, draw)
        pairs = passes(view, run.entry.mask_id, run.config.noise.comp_demo)
        requests += [request for request, _ in pairs]
        items.append(Item(example, draw, view, [rows for _, rows in pairs]))
    return UnitWork(unit, len(examples), items, requests)


def finish_unit(
    run: Run, work: UnitWork, scores: Sequence[Scores]
) -> tuple[list[CacheRow], dict[str, Any]]:
    """Rows of the shard, and the counts stored with it. TideError where a score is not finite."""
    about = RowSettings(run.config.targets.signals, run.config.noise.comp_demo, run.layout.partial)
    remaining, rows, spec = iter(scores), [], run.target_spec()
    chunks = without_chunks = 0
    for item in work.items:
        parts = [next(remaining) for _ in item.rows]
        for part in parts:
            refuse_nonfinite(part, item.example.id)
        merged = merge_passes(spec, item.view.positions.size, parts, item.rows)
        row = cache_row(item.example, item.draw, work.unit.draw, item.view, merged, about)
        if row.chunk_logp is not None:
            chunks += row.chunk_logp.size
            without_chunks += bool(row.masked.size and not row.chunk_logp.size)
        rows.append(row)
    counts = {
        "rows_without_chunks": without_chunks,
        "masked": sum(row.masked.size for row in rows),
        "chunks": chunks,
        "draw": work.unit.draw,
        "part": work.unit.part,
        CACHE: run.manifest.digest,
    }
    return rows, counts


def merge_passes(
    spec: TargetSpec, n: int, parts: Sequence[Scores], rows_of: Sequence[np.ndarray]
) -> Scores:
    """The rows of several passes in the order of the `n` positions; pass i read `rows_of[i]`."""
    merged = Scores(np.zeros(n, np.float32), np.zeros(n, np.float32))
    if spec.k:
        temperatures = len(spec.temperatures)
        classes = (n, temperatures, spec.classes)
        merged = dataclasses.replace(
            merged,
            topk_sizes=np.zeros(n, np.int32),
            topk_ids=np.zeros((n, spec.k), np.int32),
            topk_logp=np.zeros((n, spec.k), np.float32),
            tail_odds=np.zeros((n, temperatures), np.float32),
            class_mass=np.zeros(classes, np.float32) if spec.classes > 1 else None,
        )
    for scores, rows in zip(parts, rows_of, strict=True):
        for field in dataclasses.fields(Scores):
            target = getattr(merged, field.name)
            if target is not None:
                target[rows] = getattr(scores, field.name)
    return merged


@dataclass(frozen=True)
class RowSettings:
    """What of the settings shapes a row."""

    signals: tuple[str, ...]
    comp_demo: bool
    partial: bool = False


def cache_row(
    example: Prepared,
    draw: Draw,
    number: int,
    view: TeacherView,
    scores: Scores,
    about: RowSettings,
) -> CacheRow:
    """The row of draw `number` of an example, from what the teacher said of `view`."""
    chunk_student = chunk_teacher = chunk_logp = ids = top = None
    if "chunks" in about.signals:
        if view.student is not None:  # every masked token that the teacher reads is a chunk
            chunk_student = np.stack([view.student, view.student + 1], axis=1)
            chunk_teacher = np.stack([view.positions, view.positions + 1], axis=1)
        else:
            chunk_teacher = example.chunks[draw.chunks, :2]
            chunk_student = example.chunks[draw.chunks, 2:]
        # log p(c) = Σ over the chunk's tokens of log p(gold)
        sums = np.bincount(view.chunk_of, scores.gold_logp, minlength=len(chunk_student))
        chunk_logp = sums.astype(np.float32)
    if scores.topk_sizes is not None:
        assert scores.topk_ids is not None and scores.topk_logp is not None
        keep = np.arange(scores.topk_ids.shape[1]) < scores.topk_sizes[:, None]
        ids, top = scores.topk_ids[keep], scores.topk_logp[keep]
    return CacheRow(
        example_id=example.id,
        label=example.label,
        draw=number,
        t=draw.t,
        student_ids=example.student_ids,
        spans=example.spans,
        masked=draw.masked,
        read=view.student if about.partial else None,
        teacher_ids=example.teacher_ids,
        teacher_masked=None if example.teacher_ids is None else view.positions,
        split=view.in_a if about.comp_demo else np.zeros_like(view.in_a),
        gold_logp=scores.gold_logp,
        logsumexp=scores.logsumexp,
        topk_sizes=scores.topk_sizes,
        topk_ids=ids,
        topk_logp=top,
        tail_odds=scores.tail_odds,
        class_mass=scores.class_mass,
        chunk_student=chunk_student,
        chunk_teacher=chunk_teacher,
        chunk_logp=chunk_logp,
    )


def run_units(run: Run, engine: Engine, units: Sequence[Unit]) -> None:
    """Score `units` and write a shard for each, under a progress bar.

    What was scored is written even when a later unit fails or Ctrl-C comes.
    """
    groups = iter(together(run, units))

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
                progress.wrote(work.unit, work.examples, busy_seconds)

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


def examples_of(run: Run, unit: Unit) -> list[Prepared]:
    """The prepared examples of `unit`."""
    size = run.config.shard_examples
    return run.data.between(unit.part * size, (unit.part + 1) * size)


def together(run: Run, units: Sequence[Unit]) -> list[list[Unit]]:
    """Units in groups that are scored together: all draws of a part where passes share a clean copy
    (`engines.packs`), else each alone.
    """
    if isinstance(run.entry.attention, Full):
        return [[unit] for unit in units]
    groups: dict[int, list[Unit]] = {}
    for unit in units:
        groups.setdefault(unit.part, []).append(unit)
    return list(groups.values())
