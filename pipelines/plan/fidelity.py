"""`tide fidelity`: what a cache loses, as the angle between its gradient and that of full logits.

Nothing is trained. A sample is scored by the teacher with full logits. For every point of a grid it
is written as a cache of these settings would be and read back, and the gradient of the objective is
set beside the one with all of the vocabulary. The priors come from one half of the examples, the
angles from the other.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from shared.cache.levels import LARGEST_ODDS, from_table, to_table
from shared.cache.manifest import Manifest
from shared.cache.row import CacheRow, Vocabulary
from shared.cache.shards import Unit, column_bytes, table_bytes
from shared.models.checkpoint import open_checkpoint, resolve
from shared.settings.config import KL, CacheConfig, StudentConfig, Tidal
from shared.system.files import TideError
from student_train.batches.collate import TargetReader, collate
from student_train.losses.objective import objective
from student_train.losses.targets import Classes, Targets, TopKTargets, rows_of
from student_train.model import batch_hidden, student_for
from teacher_cache.method import Scores, extract, member_matrix, outside_sums
from teacher_cache.run.open import Run, open_or_begin
from teacher_cache.run.tables import classes_for
from teacher_cache.run.work import UnitWork, finish_unit, load_engine, prepare_unit

PROGRESS = 0.5  # halfway through training, where TIDAL mixes
TARGET_COLUMNS = ("topk_sizes", "topk_ranks", "topk_logp", "tail_odds", "class_mass")
ROWS = 128  # whose gradients on the logits exist at a time
Logits = list[tuple[Tensor, Tensor]]  # of each request: [read, vocab], and gold ids [read]


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
    """One point of the grid."""

    k: int
    classes: int
    tail: str
    objective: str
    temperature: float
    size: float  # bytes a position on disk
    mass: float  # the teacher's probability in the top-k
    logits: float  # cosines of the cached and the full gradient: on the logits,
    hidden: float  # on the hidden states,
    head: float  # and on the LM head
    norm: float  # ratio of their norms on the hidden states


def measure_fidelity(
    config: CacheConfig, student: StudentConfig, grid: Grid, examples: int
) -> list[Fidelity]:
    """The grid. TideError where teacher and student share no tokenizer."""
    # 1. Two halves of a sample under its first draw: the priors' and the angles'.
    temperatures = tuple(sorted({1.0, *grid.temperatures}))
    run = open_or_begin(with_targets(config, signals=("topk",), temperatures=temperatures))
    if run.shared is None:
        raise TideError(
            f"{config.teacher} gives the student no top-k in its own vocabulary",
            expected="a teacher that shares the student's tokenizer",
            fix="use such a teacher, as tiny-shared; chunk likelihoods are cached whole",
        )
    if run.config.engine.type != "transformers":
        what = "full logits come from the transformers engine alone"
        raise TideError(what, fix="use --set engine.type=transformers")
    if max(grid.ks) > (most := run.checkpoint.embedding_rows):
        raise TideError(f"k is {max(grid.ks)}", expected=f"1 to {most}, all of the vocabulary")
    chosen = run.data.between(0, min(examples, run.data.examples))
    fit, work = (prepare_unit(run, Unit(0, 0), half) for half in (chosen[1::2], chosen[0::2]))
    if not (fit.requests and work.requests):
        raise TideError("no example of the data has a masked token", fix="take more examples")

    # 2. The teacher's full logits of both; the student, and the classes that it may have.
    engine: Any = load_engine(run)
    fit_logits, logits = engine.logits(fit.requests), engine.logits(work.requests)
    checkpoint = open_checkpoint(resolve(student.checkpoint)) if student.checkpoint else None
    model = student_for(student, checkpoint, run.student, run.manifest)
    class_maps = {}
    for classes in {1, *grid.classes}:
        own = with_targets(run.config, classes=classes)
        class_maps[classes], _ = classes_for(replace(run, config=own))
    whole = full_targets(work, logits, class_maps[1], temperatures)
    states = None

    # 3. Every cache of the grid, written and read, and every way to learn from it.
    points = []
    pairs = list(itertools.product(grid.ks, grid.classes))
    for k, classes in tqdm(pairs, unit="cache", desc="fidelity"):
        own = replace(run, config=with_targets(run.config, k=k, classes=classes, mass=1.0))
        own, rows = cached_rows(own, class_maps[classes], fit_logits, work, logits)
        layout = own.layout
        columns = to_table(rows, layout)
        sizes = column_bytes(table_bytes(columns, layout, {}))
        positions = max(1, sum(row.masked.size for row in rows))
        size = sum(sizes[name] for name in TARGET_COLUMNS) / positions
        rows = from_table(columns, layout)
        states = states or student_states(model, rows, run.manifest)
        read = TargetReader(run.manifest, layout)(collate(rows, run.manifest))
        assert read.topk is not None
        ways = itertools.product(grid.tails, grid.objectives, grid.temperatures)
        for tail, kind, temperature in ways:
            settings = KL(temperature=temperature, tidal=Tidal() if kind == "tidal" else None)
            topk = replace(read.topk, student_shaped=tail == "student")
            mass = float(torch.sigmoid(-topk.odds[temperature]).mean())
            angles = compare(*states, replace(read, topk=topk), whole, settings)
            points.append(Fidelity(k, classes, tail, kind, temperature, size, mass, *angles))
    return points


def with_targets(config: CacheConfig, **changes: Any) -> CacheConfig:
    """The settings with other targets."""
    return replace(config, targets=replace(config.targets, **changes))


def cached_rows(
    run: Run, class_of: np.ndarray, fit_logits: Logits, work: UnitWork, logits: Logits
) -> tuple[Run, list[CacheRow]]:
    """The rows of a cache with the run's k and these classes, and the run with its tables."""
    excluded = torch.from_numpy(np.flatnonzero(class_of < 0))

    # 1. Priors and ranks, from the half that is not looked at.
    spec = run.target_spec()
    outside, ids, positions = np.zeros((len(spec.temperatures), class_of.size)), [], 0
    for part, gold in fit_logits:
        ids.append(extract(part, gold, spec, excluded)["topk_ids"].numpy().reshape(-1))
        outside += outside_sums(part, spec, excluded).double().numpy()
        positions += len(gold)
    vocabulary = Vocabulary.of(class_of, outside, positions, np.concatenate(ids))
    run = replace(run, vocabulary=vocabulary)

    # 2. Scores of the other half, as an engine gives them; then rows.
    spec = run.target_spec()
    members = member_matrix(class_of, spec.classes) if spec.classes > 1 else None
    scores = []
    for part, gold in logits:
        fields = extract(part, gold, spec, excluded, members)
        scores.append(Scores(**{name: cells.numpy() for name, cells in fields.items()}))
    return run, finish_unit(run, work, scores)[0]


def full_targets(
    work: UnitWork, logits: Logits, class_of: np.ndarray, temperatures: Sequence[float]
) -> TopKTargets:
    """The teacher's full logits as targets: all shared ids are in the list, nothing is outside."""
    # 1. From the order of the requests to that of the rows' positions.
    places, start = [], 0
    for item in work.items:
        places += [start + rows for rows in item.rows]
        start += item.view.positions.size
    ordered = torch.cat([part for part, _ in logits])[np.argsort(np.concatenate(places))]

    # 2. All shared ids of every row [positions, shared].
    ids = torch.from_numpy(np.flatnonzero(class_of >= 0)).expand(start, -1)
    logp = torch.log_softmax(ordered.gather(1, ids), dim=1)
    empty = torch.full((start,), -LARGEST_ODDS)
    kept = torch.ones((), dtype=torch.bool).expand_as(ids)
    classes = Classes(torch.from_numpy(class_of).long(), 1, {})
    return TopKTargets(ids, logp, kept, dict.fromkeys(temperatures, empty), classes)


@torch.no_grad()
def student_states(model: Any, rows: list[CacheRow], manifest: Manifest) -> tuple[Tensor, Tensor]:
    """The student's hidden states at masked positions [n, width], and its head [vocab, width]."""
    block = manifest.fingerprint.lengths.block
    parts = [batch_hidden(model, collate([row], manifest), block) for row in rows]
    return torch.cat(parts).float(), model.lm_head.weight.detach().float()


def compare(
    hidden: Tensor, head: Tensor, cached: Targets, whole: TopKTargets, settings: KL
) -> tuple[float, float, float, float]:
    """Cosines of the gradients on logits, hidden states and head; ratio of norms on the second."""
    heads = [torch.zeros_like(head) for _ in range(2)]
    products = torch.zeros(2, 3, dtype=torch.float64)  # [logits, hidden], [a·b, a·a, b·b]
    for start in range(0, len(hidden), ROWS):
        part = slice(start, min(len(hidden), start + ROWS))
        gradients = []
        for i, topk in enumerate((cached.topk, whole)):
            assert topk is not None
            targets = Targets(cached.gold[part], cached.t[part], rows_of(topk, part))
            logits = (hidden[part] @ head.T).requires_grad_()
            loss = objective(logits, targets, settings, PROGRESS).distillation
            (gradient,) = torch.autograd.grad(loss, logits)
            heads[i] += gradient.T @ hidden[part]
            gradients.append((gradient, gradient @ head))
        for j, (a, b) in enumerate(zip(*gradients, strict=True)):
            products[j] += dot_products(a, b)
    on_logits, on_hidden, on_head = (
        float(ab / (aa * bb).sqrt()) for ab, aa, bb in (*products, dot_products(*heads))
    )
    return on_logits, on_hidden, on_head, float((products[1, 1] / products[1, 2]).sqrt())


def dot_products(a: Tensor, b: Tensor) -> Tensor:
    """[a·b, a·a, b·b] in float64."""
    a, b = a.double().flatten(), b.double().flatten()
    return torch.stack([a @ b, a @ a, b @ b])


def table(points: Sequence[Fidelity]) -> list[str]:
    """The grid in lines of Markdown."""
    lines = [
        "| objective | T | k | classes | tail | bytes a position | mass in top-k "
        "| cosine: logits | hidden | head | norm |",
        "|---|" + "---|" * 10,
    ]
    order = sorted(
        points, key=lambda p: (p.objective, p.temperature, p.k, p.classes, p.tail == "prior")
    )
    return lines + [
        f"| {p.objective} | {p.temperature:g} | {p.k} | {p.classes} | {p.tail} | {p.size:.0f} "
        f"| {p.mass:.3f} | {p.logits:.4f} | {p.hidden:.4f} | {p.head:.4f} | {p.norm:.3f} |"
        for p in order
    ]
