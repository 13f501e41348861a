"""`tide fidelity`: what a cache loses, as the angle between its gradient and that of the teacher's
full logits.

Nothing is trained. A sample is scored by the teacher with full logits. For every point of a grid it
is written as a cache of these settings would be and read back, and the gradient of the objective is
set beside the one with all of the vocabulary. The priors come from one half of the examples, the
angles from the other.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from shared.cache.columns import from_table, to_table
from shared.cache.levels import LARGEST_ODDS
from shared.cache.manifest import Manifest
from shared.cache.row import CacheRow, Layout
from shared.cache.shards import Unit, column_bytes, table_bytes
from shared.cache.vocabulary import Vocabulary
from shared.models.checkpoint import open_checkpoint, resolve
from shared.settings.config import CacheConfig, StudentConfig
from shared.settings.objectives import KL, Tidal
from shared.system.errors import TideError
from student_train.batches.collate import TargetReader, collate
from student_train.losses.objective import objective
from student_train.losses.targets import Classes, Targets, TopKTargets, rows_of
from student_train.model import batch_hidden, student_for
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.method.targets import (
    Scores,
    TargetSpec,
    excluded_ids,
    extract,
    member_matrix,
    outside_sums,
)
from teacher_cache.run.open import Run, open_or_begin
from teacher_cache.run.tables import classes_for
from teacher_cache.run.work import UnitWork, finish_unit, load_engine, prepare_unit

PROGRESS = 0.5  # halfway through training, where TIDAL mixes
TARGET_COLUMNS = ("topk_sizes", "topk_ranks", "topk_logp", "tail_odds", "class_mass")
ROWS = 128  # whose gradients on the logits exist at a time


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
    """One point of the grid: bytes a position on disk, the teacher's mass in the top-k, cosines
    between the cached and the full gradient, and the ratio of their norms on the hidden states.
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
class Sample:
    """Two halves of a sample with the teacher's full logits and gold ids, request by request: `fit`
    for the priors, `logits` of the `work` that is cached.
    """

    plan: Run
    fit: list[tuple[Tensor, Tensor]]
    work: UnitWork
    logits: list[tuple[Tensor, Tensor]]

    @classmethod
    def take(cls, plan: Run, examples: int) -> "Sample":
        """The first examples of the data under their first draw, every other one for the priors."""
        chosen = plan.data.between(0, min(examples, plan.data.examples))
        fit, work = (prepare_unit(plan, Unit(0, 0), part) for part in (chosen[1::2], chosen[0::2]))
        if not (fit.requests and work.requests):
            raise TideError("no example of the data has a masked token", fix="take more examples")
        with closing(load_engine(plan)) as engine:
            if not isinstance(engine, TransformersEngine):
                raise TideError(
                    "full logits come from the transformers engine alone",
                    fix="use --set engine.type=transformers",
                )
            return cls(plan, engine.logits(fit.requests), work, engine.logits(work.requests))

    def cached(self, k: int, class_of: np.ndarray) -> tuple[Layout, list[CacheRow]]:
        """The rows of a cache with this k and these classes of the vocabulary."""
        width, classes = self.logits[0][0].shape[1], int(class_of.max()) + 1
        if k > width:
            raise TideError(
                f"k {k} is more than the {width} tokens of the vocabulary", expected=f"1 to {width}"
            )
        settings = self.plan.config.targets
        spec = TargetSpec(k, 1.0, settings.stored_temperatures)
        shared_ids = self.plan.shared_ids()
        assert shared_ids is not None
        excluded = torch.from_numpy(excluded_ids(shared_ids, self.plan.checkpoint.embedding_rows))

        # 1. Priors and ranks, from the half that is not looked at.
        total, ids = np.zeros((len(spec.temperatures), class_of.size)), []
        for logits, gold in self.fit:
            ids.append(extract(logits, gold, spec, excluded)["topk_ids"].numpy().reshape(-1))
            total += outside_sums(logits, spec, excluded).double().numpy()
        positions = sum(len(gold) for _, gold in self.fit)
        vocabulary = Vocabulary.of(class_of, total, positions, np.concatenate(ids))

        # 2. Scores of the other half, as an engine gives them; then rows.
        config = dataclasses.replace(
            self.plan.config, targets=dataclasses.replace(settings, k=k, classes=classes)
        )
        plan = dataclasses.replace(self.plan, config=config, vocabulary=vocabulary)
        members = member_matrix(class_of, classes) if classes > 1 else None
        spec = dataclasses.replace(spec, classes=classes)
        scores = []
        for logits, gold in self.logits:
            fields = extract(logits, gold, spec, excluded, members)
            scores.append(Scores(**{name: cells.numpy() for name, cells in fields.items()}))
        return plan.layout, finish_unit(plan, self.work, scores)[0]

    def full_logits(self) -> Tensor:
        """Full logits of the half that is cached [positions, vocab], in the order of its rows'
        positions.
        """
        parts, number = [], 0
        for item in self.work.items:
            whole = torch.zeros(item.view.positions.size, self.logits[0][0].shape[1])
            for rows in item.rows:
                whole[torch.from_numpy(rows)] = self.logits[number][0]
                number += 1
            parts.append(whole)
        return torch.cat(parts)


def measure_fidelity(
    config: CacheConfig, student: StudentConfig, grid: Grid, examples: int
) -> list[Fidelity]:
    """The grid. TideError where teacher and student share no tokenizer."""
    temperatures = tuple(sorted({1.0, *grid.temperatures}))
    targets = dataclasses.replace(config.targets, signals=("topk",), temperatures=temperatures)
    plan = open_or_begin(dataclasses.replace(config, targets=targets))
    if plan.shared is None:
        raise TideError(
            f"{config.teacher} gives the student no top-k in its own vocabulary",
            expected="a teacher that shares the student's tokenizer",
            fix="use such a teacher, as tiny-shared; chunk likelihoods are cached whole",
        )
    sample = Sample.take(plan, examples)
    checkpoint = open_checkpoint(resolve(student.checkpoint)) if student.checkpoint else None
    model = student_for(student, checkpoint, plan.student, plan.manifest)
    class_maps = {}
    for classes in grid.classes:
        own = dataclasses.replace(plan.config.targets, classes=classes)
        class_maps[classes] = classes_for(
            dataclasses.replace(plan, config=dataclasses.replace(plan.config, targets=own))
        )[0]
    points: list[Fidelity] = []
    states = whole = None
    pairs = list(itertools.product(grid.ks, grid.classes))
    for k, classes in tqdm(pairs, unit="cache", desc="fidelity"):
        layout, rows = sample.cached(k, class_maps[classes])
        table = to_table(rows, layout)
        sizes = column_bytes(table_bytes(table, layout, {}))
        positions = sum(row.masked.size for row in rows)
        size = sum(sizes[name] for name in TARGET_COLUMNS) / max(1, positions)
        rows = from_table(table, layout)
        if states is None or whole is None:
            states = student_states(model, rows, plan.manifest)
            assert layout.vocabulary is not None
            whole = full_targets(sample.full_logits(), layout.vocabulary, temperatures)
        read = TargetReader(plan.manifest, layout)(collate(rows, plan.manifest))
        assert read.topk is not None
        for tail, kind, temperature in itertools.product(
            grid.tails, grid.objectives, grid.temperatures
        ):
            settings = KL(temperature=temperature, tidal=Tidal() if kind == "tidal" else None)
            topk = dataclasses.replace(read.topk, student_shaped=tail == "student")
            mass = float(torch.sigmoid(-topk.odds[temperature]).mean())
            cached = dataclasses.replace(read, topk=topk)
            angles = compare(*states, cached, whole, settings)
            points.append(Fidelity(k, classes, tail, kind, temperature, size, mass, *angles))
    return points


@torch.no_grad()
def student_states(model: Any, rows: list[CacheRow], manifest: Manifest) -> tuple[Tensor, Tensor]:
    """The student's hidden states at masked positions [n, width], and its head [vocab, width]."""
    block = manifest.fingerprint.lengths.block
    parts = [batch_hidden(model, collate([row], manifest), block) for row in rows]
    return torch.cat(parts).float(), model.lm_head.weight.detach().float()


def full_targets(
    logits: Tensor, vocabulary: Vocabulary, temperatures: Sequence[float]
) -> TopKTargets:
    """The teacher's full logits as targets: all shared ids are in the list, nothing is outside."""
    ids = torch.from_numpy(np.flatnonzero(vocabulary.shared)).expand(len(logits), -1)
    logp = torch.log_softmax(logits.gather(1, ids), dim=1)
    empty = torch.full((len(logits),), -LARGEST_ODDS)
    classes = Classes(torch.from_numpy(np.where(vocabulary.shared, 0, -1)).long(), 1, {})
    kept = torch.ones((), dtype=torch.bool).expand_as(ids)
    return TopKTargets(ids, logp, kept, dict.fromkeys(temperatures, empty), classes)


def compare(
    hidden: Tensor, head: Tensor, cached: Targets, whole: TopKTargets, settings: KL
) -> tuple[float, float, float, float]:
    """Cosines of the two gradients on logits, hidden states and head; the ratio of their norms on
    the hidden states.
    """
    heads = [torch.zeros_like(head) for _ in range(2)]
    dots = torch.zeros(2, 3, dtype=torch.float64)  # [logits, hidden], [a·b, a·a, b·b]
    for start in range(0, len(hidden), ROWS):
        part = slice(start, min(len(hidden), start + ROWS))
        both = []
        for i, topk in enumerate((cached.topk, whole)):
            assert topk is not None
            targets = Targets(cached.gold[part], cached.t[part], rows_of(topk, part))
            logits = (hidden[part] @ head.T).requires_grad_()
            loss = objective(logits, targets, settings, PROGRESS).distillation
            (gradient,) = torch.autograd.grad(loss, logits)
            heads[i] += gradient.T @ hidden[part]
            both.append((gradient, gradient @ head))
        for j in range(2):
            a, b = both[0][j].double().flatten(), both[1][j].double().flatten()
            dots[j] += torch.stack([a @ b, a @ a, b @ b])
    on_logits, on_hidden = (dots[:, 0] / (dots[:, 1] * dots[:, 2]).sqrt()).tolist()
    a, b = (gradient.double().flatten() for gradient in heads)
    on_head = float(a @ b / (a.norm() * b.norm()))
    return on_logits, on_hidden, on_head, float((dots[1, 1] / dots[1, 2]).sqrt())


def table(points: Sequence[Fidelity]) -> list[str]:
    """The grid in lines of Markdown."""
    lines = [
        "| objective | T | k | classes | tail | bytes a position | mass in top-k "
        "| cosine: logits | hidden | head | norm |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = sorted(
        points, key=lambda p: (p.objective, p.temperature, p.k, p.classes, p.tail == "prior")
    )
    return lines + [
        f"| {p.objective} | {p.temperature:g} | {p.k} | {p.classes} | {p.tail} | {p.size:.0f} "
        f"| {p.mass:.3f} | {p.logits:.4f} | {p.hidden:.4f} | {p.head:.4f} | {p.norm:.3f} |"
        for p in order
    ]
