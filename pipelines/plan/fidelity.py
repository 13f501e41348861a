"""`tide fidelity`: what a cache loses, as the angle between its gradient and that of the teacher's full logits.

Nothing is trained. A sample is scored by the teacher with full logits. For every point of a grid it is written as a
cache of these settings would be and read back, and the gradient of the objective is set beside the one with all of the
vocabulary. The priors come from one half of the examples, the angles from the other.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

from pipelines.plan.recorded import take_sample
from shared.cache.columns import from_table, to_table
from shared.cache.levels import LARGEST_ODDS
from shared.cache.manifest import Manifest
from shared.cache.row import CacheRow, Layout
from shared.cache.shards import column_bytes, table_bytes
from shared.cache.vocabulary import Vocabulary
from shared.models.checkpoint import open_checkpoint, resolve
from shared.settings.config import CacheConfig, StudentConfig
from shared.settings.objectives import KL, Tidal
from shared.system.errors import TideError
from student_train.batches.collate import TargetReader, collate
from student_train.losses.objective import objective
from student_train.losses.targets import Classes, Targets, TopKTargets, rows_of
from student_train.model.student import batch_hidden, student_for
from teacher_cache.run.open import open_or_begin

_PROGRESS = 0.5
_TARGET_COLUMNS = ("topk_sizes", "topk_ranks", "topk_logp", "tail_odds", "class_mass")
_ROWS = 128


@dataclass(frozen=True)
class Grid:
    """What is varied."""

    ks: Sequence[int] = (16, 32, 64)
    classes: Sequence[int] = (1, 64)
    tails: Sequence[str] = ("student", "prior")
    temperatures: Sequence[float] = (1.0, 2.0)
    objectives: Sequence[str] = ("tidal",)


@dataclass(frozen=True)
class Fidelity:
    """One point of the grid: bytes a position on disk, the teacher's mass in the top-k, cosines between the cached and
    the full gradient, and the ratio of their norms on the hidden states.
    """

    k: int
    classes: int
    tail: str
    objective: str
    temperature: float
    size: float
    mass: float
    logits: float
    hidden: float
    head: float
    norm: float


@dataclass(frozen=True)
class _Student:
    hidden: Tensor
    head: Tensor


def measure_fidelity(
    config: CacheConfig, student: StudentConfig, grid: Grid, examples: int
) -> list[Fidelity]:
    """The grid, halfway through training. TideError where teacher and student share no tokenizer."""
    hottest = tuple(sorted({1.0, *grid.temperatures}))
    targets = dataclasses.replace(config.targets, signals=("topk",), temperatures=hottest)
    plan = open_or_begin(dataclasses.replace(config, targets=targets))
    if plan.shared is None:
        raise TideError(
            f"{config.teacher} gives the student no top-k in its own vocabulary",
            expected="a teacher that shares the student's tokenizer",
            fix="use such a teacher, as tiny-shared; chunk likelihoods are cached whole and lose nothing",
        )
    sample = take_sample(plan, examples)
    checkpoint = (
        None if student.checkpoint is None else open_checkpoint(resolve(student.checkpoint))
    )
    model = student_for(student, checkpoint, plan.student, plan.manifest)
    points: list[Fidelity] = []
    states: _Student | None = None
    whole: TopKTargets | None = None
    for k, classes in tqdm(
        list(itertools.product(grid.ks, grid.classes)), unit="cache", desc="fidelity"
    ):
        layout, rows = sample.cached(k, classes)
        table = to_table(rows, layout)
        size = _bytes(table, layout, sum(row.masked.size for row in rows))
        rows = from_table(table, layout)
        batch = collate(rows, plan.manifest)
        assert layout.vocabulary is not None
        if states is None or whole is None:
            states = _states(model, rows, plan.manifest)
            whole = _whole(sample.read_logits(), layout.vocabulary, hottest)
        read = TargetReader(plan.manifest, layout)(batch)
        assert read.topk is not None
        for tail, kind, temperature in itertools.product(
            grid.tails, grid.objectives, grid.temperatures
        ):
            settings = KL(temperature=temperature, tidal=Tidal() if kind == "tidal" else None)
            shaped = dataclasses.replace(read.topk, student_shaped=tail == "student")
            mass = float(torch.sigmoid(-read.topk.odds[temperature]).mean())
            numbers = _compare(states, dataclasses.replace(read, topk=shaped), whole, settings)
            points.append(Fidelity(k, classes, tail, kind, temperature, size, mass, *numbers))
    return points


def _bytes(table: pa.Table, layout: Layout, positions: int) -> float:
    """Bytes a position of what is kept of the top-k and its tail."""
    found = column_bytes(table_bytes(table, layout, {}))
    return sum(found[name] for name in _TARGET_COLUMNS) / max(1, positions)


@torch.no_grad()
def _states(model: Any, rows: list[CacheRow], manifest: Manifest) -> _Student:
    """The student's hidden states at every masked position, and its head."""
    block = manifest.fingerprint.lengths.block
    parts = [batch_hidden(model, collate([row], manifest), block) for row in rows]
    return _Student(torch.cat(parts).float(), model.lm_head.weight.detach().float())


def _whole(logits: Tensor, vocabulary: Vocabulary, temperatures: Sequence[float]) -> TopKTargets:
    """The teacher's full logits as targets: all shared ids are in the list, nothing is outside."""
    ids = torch.from_numpy(np.flatnonzero(vocabulary.shared)).expand(len(logits), -1)
    logp = torch.log_softmax(logits.gather(1, ids), dim=1)
    empty = torch.full((len(logits),), -LARGEST_ODDS)
    classes = Classes(torch.from_numpy(np.where(vocabulary.shared, 0, -1)).long(), 1, {})
    kept = torch.ones((), dtype=torch.bool).expand_as(ids)
    return TopKTargets(ids, logp, kept, dict.fromkeys(temperatures, empty), classes)


def _compare(
    student: _Student, cached: Targets, whole: TopKTargets, settings: KL
) -> tuple[float, float, float, float]:
    """Cosines on logits, hidden states and head, and the ratio of norms on the hidden states."""
    n = len(student.hidden)
    heads = [torch.zeros_like(student.head) for _ in range(2)]
    dots = torch.zeros(
        2, 3, dtype=torch.float64
    )  # on logits and hidden states: cached·whole, cached², whole²
    for start in range(0, n, _ROWS):
        part = slice(start, min(n, start + _ROWS))
        hidden = student.hidden[part]
        both = []
        for i, topk in enumerate((cached.topk, whole)):
            assert topk is not None
            targets = Targets(cached.gold[part], cached.t[part], rows_of(topk, part))
            logits = (hidden @ student.head.T).requires_grad_()
            (gradient,) = torch.autograd.grad(
                objective(logits, targets, settings, _PROGRESS).distillation, logits
            )
            heads[i] += gradient.T @ hidden
            both.append((gradient, gradient @ student.head))
        for j in range(2):
            a, b = both[0][j].double().flatten(), both[1][j].double().flatten()
            dots[j] += torch.stack([a @ b, a @ a, b @ b])
    cosines = (dots[:, 0] / (dots[:, 1] * dots[:, 2]).sqrt()).tolist()
    a, b = (head.double().flatten() for head in heads)
    return (
        cosines[0],
        cosines[1],
        float(a @ b / (a.norm() * b.norm())),
        float((dots[1, 1] / dots[1, 2]).sqrt()),
    )


def table(points: Sequence[Fidelity]) -> list[str]:
    """The grid in lines of Markdown."""
    lines = [
        "| objective | T | k | classes | tail | bytes a position | mass in top-k "
        "| cosine: logits | hidden | head | norm |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    ordered = sorted(
        points, key=lambda p: (p.objective, p.temperature, p.k, p.classes, p.tail == "prior")
    )
    return lines + [
        f"| {p.objective} | {p.temperature:g} | {p.k} | {p.classes} | {p.tail} | {p.size:.0f} | {p.mass:.3f} | "
        f"{p.logits:.4f} | {p.hidden:.4f} | {p.head:.4f} | {p.norm:.3f} |"
        for p in ordered
    ]
