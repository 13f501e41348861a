"""`tide fidelity`: what a cache loses, beside the full logits of the same teacher.

Nothing is trained. Of a sample the teacher's hidden states are taken; for every point of a grid it
is written as a cache of these settings would be and read back. Its distance from the teacher is set
beside the student's, which foretells the share of distillation's gain that is lost, and the
gradient of the objective beside the one with all of the vocabulary. The tables come from one half
of the examples, the numbers from the other.
"""

import itertools
from collections.abc import Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from shared.cache.levels import from_table, to_table
from shared.cache.manifest import Manifest
from shared.cache.row import CacheRow
from shared.cache.shards import Unit, column_bytes, table_bytes
from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import head_rows
from shared.settings.config import KL, CacheConfig, StudentConfig, Tidal
from shared.system.files import TideError
from student_train.batches.collate import TargetReader, collate
from student_train.losses.divergence import token_divergence
from student_train.losses.objective import objective
from student_train.losses.targets import Targets, TopKTargets, rows_of, teacher_log_weights
from student_train.model import batch_hidden, student_for
from teacher_cache.method import TailEncoder, extract
from teacher_cache.run.open import Run, open_or_begin
from teacher_cache.run.tables import Sample, allowed_ids, fit_tables
from teacher_cache.run.work import UnitWork, finish_unit, load_engine, prepare_unit

PROGRESS = 0.5  # halfway through training, where TIDAL mixes
ROWS = 128  # whose gradients on the logits exist at a time


@dataclass(frozen=True)
class Grid:
    ks: Sequence[int] = (8,)
    ranks: Sequence[int] = (32, 64, 96)
    steps: Sequence[float] = (0.04,)
    temperatures: Sequence[float] = (1.0, 2.0)
    objectives: Sequence[str] = ("tidal",)


@dataclass(frozen=True)
class Fidelity:
    objective: str
    temperature: float
    k: int
    rank: int
    step: float
    size: float  # bytes a position on disk, of all columns
    apart: float  # KL(teacher ‖ cache), nats
    share: float  # of KL(teacher ‖ student)
    logits: float  # cosines of the cached and the full gradient: on the logits,
    hidden: float  # on the hidden states,
    head: float  # and on the LM head
    norm: float  # ratio of their norms on the hidden states


def measure_fidelity(
    config: CacheConfig, student: StudentConfig, grid: Grid, examples: int
) -> list[Fidelity]:
    """The grid. TideError where teacher and student share no tokenizer."""
    # 1. Two halves of a sample under its first draw: the tables' and the numbers'.
    temperatures = tuple(sorted({1.0, *grid.temperatures}))
    run = open_or_begin(with_targets(config, signals=("topk",), temperatures=temperatures))
    if run.shared is None:
        what = f"{config.teacher} gives the student no top-k in its own vocabulary"
        fix = "use such a teacher, as tiny-shared; chunk likelihoods are cached whole"
        raise TideError(what, expected="a teacher that shares the student's tokenizer", fix=fix)
    if max(grid.ks) > (most := run.checkpoint.embedding_rows):
        raise TideError(f"k is {max(grid.ks)}", expected=f"1 to {most}, all of the vocabulary")
    chosen = run.data.between(0, min(examples, run.data.examples))
    fit, work = (prepare_unit(run, Unit(0, 0), half) for half in (chosen[1::2], chosen[0::2]))
    if not (fit.requests and work.requests):
        raise TideError("no example of the data has a masked token", fix="take more examples")
    # 2. The teacher's states of both, its head; the student.
    with closing(load_engine(run)) as engine:
        states, hidden = (engine.hidden_states(each.requests) for each in (fit, work))
    head, allowed = head_rows(run.checkpoint, run.entry.architecture), allowed_ids(run)
    checkpoint = open_checkpoint(resolve(student.checkpoint)) if student.checkpoint else None
    model = student_for(student, checkpoint, run.student, run.manifest)
    # The teacher's full logits as targets, from the order of requests to that of rows' positions.
    places, start, learner = [], 0, None
    for item in work.items:
        places += [start + rows for rows in item.rows]
        start += item.view.positions.size
    shared = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    shared[np.flatnonzero(allowed)] = True
    order = np.argsort(np.concatenate(places))
    whole = TopKTargets.whole((hidden @ head.T)[order], shared)
    # 3. Every cache of the grid, written and read, and every way to learn from it.
    points = []
    caches = list(itertools.product(grid.ks, grid.ranks, grid.steps))
    for k, rank, step in tqdm(caches, unit="cache", desc="fidelity"):
        own = replace(run, config=with_targets(run.config, k=k, rank=rank, step=step, mass=1.0))
        tables = fit_tables(Sample(states, head, allowed, own.target_spec()), rank, step)
        own = replace(own, tables=tables)
        rows = cached_rows(own, work, hidden, head)
        columns = to_table(rows, own.layout)
        sizes = column_bytes(table_bytes(columns, own.layout, {}))
        size = sizes.total() / max(1, sum(row.masked.size for row in rows))
        rows = from_table(columns, own.layout)
        learner = learner or student_states(model, rows, run.manifest)
        read = TargetReader(own.layout, model.config.vocab_size)(collate(rows, run.manifest))
        for kind, temperature in itertools.product(grid.objectives, grid.temperatures):
            settings = KL(temperature=temperature, tidal=Tidal() if kind == "tidal" else None)
            numbers = compare(*learner, read, whole, settings)
            points.append(Fidelity(kind, temperature, k, rank, step, size, *numbers))
    return points


def with_targets(config: CacheConfig, **changes: Any) -> CacheConfig:
    return replace(config, targets=replace(config.targets, **changes))


def cached_rows(run: Run, work: UnitWork, hidden: Tensor, head: Tensor) -> list[CacheRow]:
    """The rows of a cache of the run's tables, from the teacher's states, request by request."""
    assert run.tables is not None
    spec, excluded = run.target_spec(), torch.from_numpy(np.flatnonzero(~run.tables.shared))
    encoder, scores = TailEncoder(run.tables, spec.temperatures), []
    parts = hidden.split([len(request.read) for request in work.requests])
    for request, states in zip(work.requests, parts, strict=True):
        gold = torch.from_numpy(request.gold.astype(np.int64))
        fields = extract(states @ head.T, states, gold, spec, excluded, encoder)
        scores.append({name: cells.numpy() for name, cells in fields.items()})
    return finish_unit(run, work, scores)[0]


@torch.no_grad()
def student_states(model: Any, rows: list[CacheRow], manifest: Manifest) -> tuple[Tensor, Tensor]:
    """The student's states where the teacher was read [n, width], and its head [vocab, width]."""
    block = manifest.fingerprint.lengths.block
    # What was not read comes last.
    parts = [batch_hidden(model, collate([r], manifest), block)[: r.asked.size] for r in rows]
    return torch.cat(parts).float(), model.lm_head.weight.detach().float()


def compare(
    hidden: Tensor, head: Tensor, cached: Targets, whole: TopKTargets, settings: KL
) -> list[float]:
    """KL of the cache from the teacher in nats, and as a share of the student's; cosines of the
    gradients on logits, hidden states and head; ratio of norms on the second.
    """
    heads = [torch.zeros_like(head) for _ in range(2)]
    products = torch.zeros(2, 3, dtype=torch.float64)  # [logits, hidden], [a·b, a·a, b·b]
    apart, lacking, temperature = 0.0, 0.0, settings.temperature  # KL of the cache, of the student
    for start in range(0, len(hidden), ROWS):
        part = slice(start, min(len(hidden), start + ROWS))
        gradients = []
        for i, topk in enumerate((cached.topk, whole)):
            assert isinstance(topk, TopKTargets)
            targets = Targets(cached.gold[part], cached.t[part], rows_of(topk, part))
            logits = (hidden[part] @ head.T).requires_grad_()
            loss = objective(logits, targets, settings, PROGRESS).distillation
            (gradient,) = torch.autograd.grad(loss, logits)
            heads[i] += gradient.T @ hidden[part]
            gradients.append((gradient, gradient @ head))
        assert isinstance(cached.topk, TopKTargets)
        own, logits = rows_of(whole, part), hidden[part] @ head.T
        given = teacher_log_weights(rows_of(cached.topk, part), temperature) * temperature
        apart += float(token_divergence(given, own, settings).sum())
        lacking += float(token_divergence(logits, own, settings).sum())
        for j, (a, b) in enumerate(zip(*gradients, strict=True)):
            products[j] += dot_products(a, b)
    angles = [float(ab / (aa * bb).sqrt()) for ab, aa, bb in (*products, dot_products(*heads))]
    norm = float((products[1, 1] / products[1, 2]).sqrt())
    return [apart / len(hidden), apart / lacking, *angles, norm]


def dot_products(a: Tensor, b: Tensor) -> Tensor:
    """[a·b, a·a, b·b] in float64."""
    a, b = a.double().flatten(), b.double().flatten()
    return torch.stack([a @ b, a @ a, b @ b])


def table(points: Sequence[Fidelity]) -> list[str]:
    lines = [
        "| objective | T | k | rank | step | bytes a position | KL(teacher ‖ cache) "
        "| ÷ KL(teacher ‖ student) | cosine: logits | hidden | head | norm |",
        "|---|" + "---|" * 11,
    ]
    formats = ("", "g", "", "", "g", ".0f", *[".4f"] * 5, ".3f")
    for point in sorted(points, key=lambda p: (p.objective, p.temperature, p.k, p.rank, -p.step)):
        cells = [f"{value:{how}}" for value, how in zip(astuple(point), formats, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
