"""Stage one: run the teacher once over every missing unit and write its shard."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from shared.atomic import remove_leftovers
from shared.config import CacheConfig
from shared.data import ChatExample, iter_examples
from shared.errors import TideError
from shared.examples import Prepared
from shared.schema import CacheRow
from shared.shards import Unit, shard_counts, write_shard
from teacher_cache.comp_demo import TeacherView, draw_for, passes, teacher_view
from teacher_cache.engines.base import Engine
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.plan import CachePlan, make_plan
from teacher_cache.targets import Scores, refuse_nonfinite
from teacher_cache.teachers.loading import load_model


@dataclass(frozen=True)
class CacheReport:
    """What a finished cache holds."""

    folder: Path
    rows: int
    masked: int
    chunks: int
    bytes: int
    computed: int
    kept: int
    counts: dict[str, int]


def build_cache(config: CacheConfig) -> CacheReport:
    """Compute every missing shard of the cache at `config.out`; finished ones are skipped.

    Raises TideError on anything that the user can mend, before the teacher is loaded where that is possible.
    """
    with _only_writer(config.out):
        plan = make_plan(config)
        remove_leftovers(config.out)
        for row in plan.data.bad_rows:
            tqdm.write(f"left out {row.place}: {row.reason}")
        missing = plan.missing
        kept = len(plan.manifest.units()) - len(missing)
        if missing:
            run_units(plan, load_engine(plan), missing)
        return summarise(plan, len(missing), kept)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the cache's lock. The system drops it with the process, however that ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("w")
    except OSError as error:
        raise TideError(f"{folder} cannot be written: {error.strerror}", fix="choose another folder") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TideError(
                f"another process is writing the cache {folder}", fix="wait for it, or choose another folder"
            ) from error
        yield


def load_engine(plan: CachePlan) -> Engine:
    """The engine that the configuration names, with the teacher loaded."""
    settings = plan.config.engine
    device = settings.device
    if device == "auto":
        device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    model = load_model(
        plan.checkpoint,
        plan.entry.architecture,
        getattr(torch, settings.dtype),
        device,
        device_map=settings.device_map,
        quantization=settings.quantization,
    )
    return TransformersEngine(
        model,
        plan.entry.attention,
        plan.target_spec(),
        shift=plan.entry.shift,
        tokens_per_batch=settings.tokens_per_batch,
        head_rows=settings.head_rows,
        shared_ids=plan.shared_ids(),
    )


def run_units(plan: CachePlan, engine: Engine, units: Sequence[Unit]) -> None:
    """Compute `units` in order, one shard each."""
    total = len(units) * plan.config.shard_examples
    with tqdm(total=total, unit="row", desc=f"cache {plan.config.teacher}", smoothing=0.05) as bar:
        for draw, group in itertools.groupby(units, key=lambda unit: unit.draw):
            wanted = {unit.part for unit in group}
            for part, examples in enumerate(_parts(plan)):
                if part in wanted:
                    unit = Unit(draw, part)
                    rows, counts = compute_unit(plan, engine, unit, examples)
                    write_shard(unit.path(plan.config.out), rows, counts)
                    bar.update(plan.config.shard_examples)
                    bar.set_postfix(shards=f"draw {draw} part {part + 1}/{plan.manifest.parts}")


def _parts(plan: CachePlan) -> Iterator[list[ChatExample]]:
    examples = iter_examples(plan.config.data)
    while part := list(itertools.islice(examples, plan.config.shard_examples)):
        yield part


def compute_unit(
    plan: CachePlan, engine: Engine, unit: Unit, examples: list[ChatExample]
) -> tuple[list[CacheRow], dict[str, int]]:
    """Rows of one unit, and the counts that are stored with its shard."""
    preparer = plan.preparer()
    prepared = preparer(examples)
    views = []
    requests = []
    for example in prepared:
        draw = draw_for(example, plan.config.noise, unit.draw)
        view = teacher_view(example, draw)
        first = len(requests)
        indices = []
        for request, rows in passes(view, plan.entry.mask_id, plan.config.noise.comp_demo):
            requests.append(request)
            indices.append(rows)
        views.append((draw, view, first, indices))
    scores = engine.score(requests)
    rows = []
    for example, (draw, view, first, indices) in zip(prepared, views, strict=True):
        parts = scores[first : first + len(indices)]
        for part in parts:
            refuse_nonfinite(part, example.id)
        chunks = None if example.shared else draw.chunks
        rows.append(
            _row(plan, example, unit.draw, draw.t, draw.masked, chunks, view, _merge(plan, view, parts, indices))
        )
    counts = dataclasses.asdict(preparer.counts)
    counts["masked"] = sum(row.masked.size for row in rows)
    counts["chunks"] = sum(0 if row.chunk_logp is None else row.chunk_logp.size for row in rows)
    return rows, counts


def _merge(plan: CachePlan, view: TeacherView, parts: Sequence[Scores], indices: Sequence[np.ndarray]) -> Scores:
    """Put the passes' rows back in the order of the teacher's positions."""
    spec = plan.target_spec()
    n = view.positions.size
    merged = Scores(
        np.zeros(n, np.float32),
        np.zeros((n, len(spec.temperatures)), np.float32),
        np.zeros(n, np.int32) if spec.k else None,
        np.zeros((n, spec.k), np.int32) if spec.k else None,
        np.zeros((n, spec.k), np.float32) if spec.k else None,
    )
    for scores, rows in zip(parts, indices, strict=True):
        for field in dataclasses.fields(Scores):
            target = getattr(merged, field.name)
            if target is not None:
                target[rows] = getattr(scores, field.name)
    return merged


def _row(
    plan: CachePlan,
    example: Prepared,
    draw: int,
    t: float,
    masked: np.ndarray,
    active: np.ndarray | None,
    view: TeacherView,
    scores: Scores,
) -> CacheRow:
    chunk_student = chunk_teacher = chunk_logp = None
    if "chunks" in plan.config.targets.signals:
        if active is None:  # a shared tokenizer: every masked token is a chunk
            chunk_student = np.stack([masked, masked + 1], axis=1)
            chunk_teacher = chunk_student + np.int32(example.offset)
        else:
            chunk_student, chunk_teacher = example.chunks[active, 2:], example.chunks[active, :2]
        token_logp = scores.gold_logit - scores.logsumexp[:, plan.target_spec().temperatures.index(1.0)]
        chunk_logp = np.bincount(view.chunk_of, token_logp, minlength=len(chunk_student)).astype(np.float32)
    ids = top = None
    if scores.topk_sizes is not None and scores.topk_ids is not None and scores.topk_logits is not None:
        keep = np.arange(scores.topk_ids.shape[1]) < scores.topk_sizes[:, None]
        ids, top = scores.topk_ids[keep], scores.topk_logits[keep]
    return CacheRow(
        example_id=example.id,
        draw=draw,
        t=t,
        student_ids=example.student_ids,
        prompt_length=example.prompt_length,
        masked=masked,
        teacher_ids=example.teacher_ids,
        teacher_masked=None if example.teacher_ids is None else view.positions,
        split=view.in_a if plan.config.noise.comp_demo else np.zeros_like(view.in_a),
        gold_logit=scores.gold_logit,
        logsumexp=scores.logsumexp,
        topk_sizes=scores.topk_sizes,
        topk_ids=ids,
        topk_logits=top,
        chunk_student=chunk_student,
        chunk_teacher=chunk_teacher,
        chunk_logp=chunk_logp,
    )


def summarise(plan: CachePlan, computed: int, kept: int) -> CacheReport:
    """Add up the counts that the shards carry. TideError where no example was usable."""
    out = plan.config.out
    total: Counter[str] = Counter()
    size = 0
    for unit in plan.manifest.units():
        path = unit.path(out)
        total.update(shard_counts(path))
        size += path.stat().st_size
    if total["rows"] == 0:
        raise TideError(
            f"no example of {plan.data.source} fits: {json.dumps(total)}",
            expected="prompts shorter than lengths.student and lengths.teacher",
            fix="raise the lengths, or use other data",
        )
    return CacheReport(out, total["rows"], total["masked"], total["chunks"], size, computed, kept, dict(total))
