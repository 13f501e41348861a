"""`tide verify`: score a sample of a cache's rows again, with any engine, and say how far the numbers lie apart."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from shared.cache.levels import CLASS_LEVELS, GOLD_STEPS, LOGIT_STEPS, ODDS_STEPS, half_steps
from shared.cache.manifest import load_manifest
from shared.cache.row import CacheRow
from shared.cache.shards import finished_units, read_shard
from shared.settings.config import CacheConfig
from shared.system.errors import TideError
from teacher_cache.engines.base import Engine
from teacher_cache.method.comp_demo import TeacherView, passes
from teacher_cache.method.targets import Scores
from teacher_cache.run.load_engine import load_engine
from teacher_cache.run.plan import CachePlan, make_plan
from teacher_cache.run.tables.settle import with_tables
from teacher_cache.run.work import merge_passes

_SEED = 0


@dataclass(frozen=True)
class Deviation:
    """How far one quantity lies from its cached value, in nats (masses: their roots), over the sample."""

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

    The sample is the same for every engine. Top-k log-probabilities are compared rank by rank (ids may change places
    where two are nearly equal), roots of the classes' masses as they are; what counts is the deviation beyond that of
    rounding. TideError where the cache, the teacher or the settings do not belong together.
    """
    if rows < 1:
        raise TideError(f"--rows is {rows}", expected="1 or more")
    cached = load_manifest(config.out).fingerprint.engine
    plan = with_tables(make_plan(config, write=False, engine=cached))
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
        content = read_shard(unit.path(plan.config.out), plan.layout)
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
    differences: dict[str, list[np.ndarray]] = {name: [] for name in _QUANTITIES}
    position = 0
    for row, view, indices in cells:
        again = merge_passes(
            plan.target_spec(),
            view.positions.size,
            scores[position : position + len(indices)],
            indices,
        )
        position += len(indices)
        _differences(row, again, plan, differences)
    found = [(name, np.concatenate(parts)) for name, parts in differences.items() if parts]
    return VerifyReport(
        plan.config.engine.type,
        len(sample),
        sum(view.positions.size for _, view, _ in cells),
        [
            Deviation(name, v.size, float(v.max(initial=0.0)), float(v.mean()) if v.size else 0.0)
            for name, v in found
        ],
    )


def _view(row: CacheRow) -> TeacherView:
    """What the teacher saw, from the row alone."""
    ids = row.student_ids if row.teacher_ids is None else row.teacher_ids
    places = row.asked if row.teacher_masked is None else row.teacher_masked
    return TeacherView(ids, places, row.split, np.arange(places.size))


_QUANTITIES = ("log p of gold", "logsumexp", "top-k log p", "tail log-odds", "√ class mass")


def _differences(
    row: CacheRow, again: Scores, plan: CachePlan, into: dict[str, list[np.ndarray]]
) -> None:
    rounded = plan.layout.values == "levels"

    def add(name: str, cached: np.ndarray, now: np.ndarray, rounding: np.ndarray | float) -> None:
        apart = np.abs(cached.astype(np.float64) - now)
        into[name].append(np.maximum(apart - (rounding if rounded else 0.0), 0.0).reshape(-1))

    add("log p of gold", row.gold_logp, again.gold_logp, 0.5 / GOLD_STEPS)
    add("logsumexp", row.logsumexp, again.logsumexp, 0.5 / LOGIT_STEPS)
    if row.topk_sizes is not None and row.topk_logp is not None and again.topk_logp is not None:
        kept = np.arange(again.topk_logp.shape[1]) < row.topk_sizes[:, None]
        steps = half_steps(row.topk_logp, plan.layout.temperatures)
        add("top-k log p", row.topk_logp, again.topk_logp[kept], steps)
    if row.tail_odds is not None and again.tail_odds is not None:
        add("tail log-odds", row.tail_odds, again.tail_odds, 0.5 / ODDS_STEPS)
    if row.class_mass is not None and again.class_mass is not None:
        levels = row.class_mass.dtype == np.uint8
        before = row.class_mass / CLASS_LEVELS if levels else np.exp(0.5 * row.class_mass)
        add("√ class mass", before, np.exp(0.5 * again.class_mass), 0.5 / CLASS_LEVELS)
