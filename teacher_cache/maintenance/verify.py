"""`tide verify`: score a sample of a cache's rows again, with any engine, and say how far the numbers lie apart."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from shared.compact import LARGEST_ERROR
from shared.config import CacheConfig
from shared.errors import TideError
from shared.manifest import load_manifest
from shared.schema import CacheRow
from shared.shards import finished_units, read_shard
from teacher_cache.comp_demo import TeacherView, passes
from teacher_cache.engines.base import Engine
from teacher_cache.engines.choose import load_engine
from teacher_cache.plan import CachePlan, make_plan
from teacher_cache.targets import Scores
from teacher_cache.work import merge_passes

_SEED = 0


@dataclass(frozen=True)
class Deviation:
    """How far one quantity lies from its cached value, in nats, over the sample."""

    name: str
    values: int
    largest: float
    mean: float


@dataclass(frozen=True)
class VerifyReport:
    """The sample, and the deviations of what is cached."""

    engine: str
    rows: int
    positions: int
    deviations: list[Deviation]

    @property
    def largest(self) -> float:
        """The largest deviation of all."""
        return max((d.largest for d in self.deviations), default=0.0)


def verify_cache(config: CacheConfig, rows: int) -> VerifyReport:
    """Compare `rows` rows of the cache at `config.out` with what `config.engine` says now.

    The sample is the same for every engine. Top-k logits are compared rank by rank (ids may change places where two
    logits are nearly equal), and what counts is the deviation beyond that of their rounding. TideError where the cache,
    the teacher or the settings do not belong together.
    """
    if rows < 1:
        raise TideError(f"--rows is {rows}", expected="1 or more")
    cached = load_manifest(config.out).fingerprint["engine"]
    plan = make_plan(config, write=False, engine=cached)
    sample = list(_sample(plan, rows))
    if not sample:
        raise TideError(f"{config.out} has no finished shard", fix="run `tide cache` first")
    with closing(load_engine(plan)) as engine:
        return compare(plan, engine, sample)


def _sample(plan: CachePlan, rows: int) -> Iterator[CacheRow]:
    """`rows` rows, spread evenly over the finished shards, the same ones every time."""
    units = finished_units(plan.config.out)
    chosen = random.Random(_SEED)
    chosen.shuffle(units)
    each = -(-rows // max(1, len(units)))
    left = rows
    for unit in units:
        if left <= 0:
            return
        content = read_shard(unit.path(plan.config.out), plan.target_spec().temperatures)
        picked = chosen.sample(content, min(each, left, len(content)))
        left -= len(picked)
        yield from picked


def compare(plan: CachePlan, engine: Engine, sample: list[CacheRow]) -> VerifyReport:
    """Score the rows of `sample` with `engine` and set the values beside the cached ones."""
    requests, cells = [], []
    for row in sample:
        view = _view(row)
        pairs = passes(view, plan.entry.mask_id, plan.config.noise.comp_demo)
        cells.append((row, view, [indices for _, indices in pairs]))
        requests += [request for request, _ in pairs]
    scores = engine.score(requests)
    differences: dict[str, list[np.ndarray]] = {"gold logit": [], "logsumexp": [], "top-k logits": []}
    position = 0
    for row, view, indices in cells:
        again = merge_passes(
            plan.target_spec(), view.positions.size, scores[position : position + len(indices)], indices
        )
        position += len(indices)
        _differences(row, again, differences)
    found = [(name, np.concatenate(parts)) for name, parts in differences.items() if parts]
    return VerifyReport(
        plan.config.engine.type,
        len(sample),
        sum(view.positions.size for _, view, _ in cells),
        [Deviation(name, v.size, float(v.max(initial=0.0)), float(v.mean()) if v.size else 0.0) for name, v in found],
    )


def _view(row: CacheRow) -> TeacherView:
    """What the teacher saw, from the row alone."""
    ids = row.student_ids if row.teacher_ids is None else row.teacher_ids
    places = row.masked if row.teacher_masked is None else row.teacher_masked
    return TeacherView(ids, places, row.split, np.arange(places.size))


def _differences(row: CacheRow, again: Scores, into: dict[str, list[np.ndarray]]) -> None:
    into["gold logit"].append(np.abs(row.gold_logit - again.gold_logit))
    into["logsumexp"].append(np.abs(row.logsumexp - again.logsumexp).reshape(-1))
    if row.topk_sizes is not None and row.topk_logits is not None and again.topk_logits is not None:
        kept = np.arange(again.topk_logits.shape[1]) < row.topk_sizes[:, None]
        apart = np.abs(row.topk_logits - again.topk_logits[kept])
        into["top-k logits"].append(np.maximum(apart - LARGEST_ERROR, 0.0))
