"""`tide verify`: is a cache whole and sound, and does its teacher still say what it holds?"""

import random
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shared.cache.ledger import LEDGER, NOTES, check_shards, load_ledger, remember, settle_ledger
from shared.cache.levels import GOLD_STEPS, LOGIT_STEPS, TAIL_STEPS, half_steps
from shared.cache.manifest import load_manifest
from shared.cache.row import CacheRow
from shared.cache.shards import finished_units
from shared.cache.value_checks import sound
from shared.settings.config import CacheConfig
from shared.system.files import TideError
from teacher_cache.method import TeacherView, passes
from teacher_cache.run.open import open_or_begin
from teacher_cache.run.work import load_engine, merge_passes


class Problem(NamedTuple):
    """One thing that is wrong. `path`: the file, where it is one that can be made again."""

    text: str
    path: Path | None = None


@dataclass(frozen=True)
class CheckReport:
    shards: int
    rows: int
    missing: int
    problems: list[Problem]

    def in_words(self) -> str:
        looked = f"{self.shards:,} shards, {self.rows:,} rows"
        lines = [f"{looked}: checksums, schema, counts and values hold"]
        if self.problems:
            lines = [f"{looked}; {len(self.problems)} problems:"]
            lines += [f"  {problem.text}" for problem in self.problems]
        if self.missing:
            lines.append(f"{self.missing:,} shards are not there yet: `tide cache` computes them")
        return "\n".join(lines)


def check_cache(folder: Path) -> CheckReport:
    """Read every shard: its bytes against the ledger, which is made anew where it is not there, its
    values against the rules. TideError where manifest or tables cannot be read.
    """
    manifest = load_manifest(folder)
    layout = manifest.layout(folder)
    problems = []
    try:
        ledger = load_ledger(folder, manifest)
    except TideError as error:
        ledger = {}
        problems.append(Problem(error.what, folder / LEDGER))
    units, expected, rows = finished_units(folder), set(manifest.units()), 0
    for unit in units:
        if unit not in expected:
            size = f"{manifest.draws} draws and {manifest.parts} parts"
            problems.append(Problem(f"{unit.path(folder)} is no part of a cache of {size}"))
    for of_shard, problem, path in check_shards(folder, manifest, layout, ledger, units):
        rows += of_shard
        if problem is not None:
            problems.append(Problem(problem, path))
    missing = len(expected - set(units))
    if not problems and not missing:
        settle_ledger(folder, manifest)
        remember(folder)
    return CheckReport(len(units), rows, missing, problems)


def delete_damaged(report: CheckReport) -> int:
    """Delete the files that have a problem, for `tide cache` to make again; how many."""
    damaged = {problem.path for problem in report.problems if problem.path is not None}
    for path in damaged:
        notes = (path.parent / NOTES).glob("*.jsonl") if path.name == LEDGER else ()
        for file in (path, *notes):
            file.unlink(missing_ok=True)
    return len(damaged)


@dataclass(frozen=True)
class VerifyReport:
    """A sample: how far each value lies from the cached one, in nats (masses: their roots)."""

    engine: str
    rows: int
    positions: int
    deviations: dict[str, np.ndarray]

    @property
    def largest(self) -> float:
        return max(float(values.max(initial=0.0)) for values in self.deviations.values())

    def in_words(self) -> str:
        lines = [f"{self.rows} rows, {self.positions:,} positions scored again with {self.engine}"]
        lines.append(f"  {'':<14}{'values':>12}{'largest':>12}{'mean':>12}")
        for name, values in self.deviations.items():
            mean, largest = values.sum() / max(1, values.size), values.max(initial=0.0)
            lines.append(f"  {name:<14}{values.size:>12,}{largest:>12.2e}{mean:>12.2e}")
        return "\n".join(lines)


def verify_cache(config: CacheConfig, rows: int) -> VerifyReport:
    """Compare `rows` rows of the cache at `config.out` with what `config.engine` says now. The
    sample, spread evenly over the shards, is the same for every engine. Top-k log-probabilities are
    compared rank by rank (ids may change places where two are nearly equal), beyond rounding.
    TideError where the cache, the teacher or the settings do not belong together.
    """
    manifest = load_manifest(config.out)  # or else it is no cache
    run = open_or_begin(config, any_engine=True)
    # 1. the sample
    units, chosen = finished_units(config.out), random.Random(0)
    chosen.shuffle(units)
    sample: list[CacheRow] = []
    for path in (unit.path(config.out) for unit in units):
        content = sound(path, run.layout, manifest).rows(path, run.layout)
        each = min(-(-rows // len(units)), rows - len(sample), len(content))
        sample += chosen.sample(content, each)
    if not sample:
        raise TideError(f"{config.out} has no finished shard", fix="run `tide cache` first")
    # 2. what the teacher saw, from the rows alone, scored again
    requests, views = [], []
    for row in sample:
        ids = row.student_ids if row.teacher_ids is None else row.teacher_ids
        places = row.asked if row.teacher_masked is None else row.teacher_masked
        view = TeacherView(ids, places, row.split, np.arange(places.size))
        pairs = passes(view, run.entry.mask_id, run.config.noise.comp_demo)
        views.append((places.size, [indices for _, indices in pairs]))
        requests += [request for request, _ in pairs]
    with closing(load_engine(run)) as engine:
        scores = iter(list(engine.score(requests)))
    # 3. how far each value lies from the cached one, less what rounding may have moved it
    rounded = run.layout.values == "levels"
    apart: dict[str, list[np.ndarray]] = {}

    def add(name: str, cached: np.ndarray, now: np.ndarray, rounding: np.ndarray | float) -> None:
        difference = np.abs(cached.astype(np.float64) - now) - (rounding if rounded else 0.0)
        apart.setdefault(name, []).append(np.maximum(difference, 0.0).reshape(-1))

    for row, (size, indices) in zip(sample, views, strict=True):
        again = merge_passes(run.target_spec(), size, [next(scores) for _ in indices], indices)
        add("log p of gold", row.gold_logp, again["gold_logp"], 0.5 / GOLD_STEPS)
        add("logsumexp", row.logsumexp, again["logsumexp"], 0.5 / LOGIT_STEPS)
        if row.topk_sizes is None or row.topk_logp is None:
            continue
        assert row.tail_code is not None and row.tail_level is not None and run.tables is not None
        kept = np.arange(again["topk_logp"].shape[1]) < row.topk_sizes[:, None]
        steps = half_steps(row.topk_logp, run.layout.temperatures)
        add("top-k log p", row.topk_logp, again["topk_logp"][kept], steps)
        # Both are rounded. In steps, and so in the unit in which an error h costs h²/2 nats.
        unit = run.tables.unit
        add("tail code", unit * row.tail_code, unit * again["tail_code"], unit)
        add("tail level", row.tail_level, again["tail_level"], 0.5 / TAIL_STEPS)
    deviations = {name: np.concatenate(parts) for name, parts in apart.items()}
    positions = sum(size for size, _ in views)
    return VerifyReport(run.config.engine.type, len(sample), positions, deviations)
