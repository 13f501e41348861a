"""Head and loss against the plain computation over whole sequences, at a real vocabulary: time and memory.

Times are of alternating runs in one process; memory of one run each in a process of its own, whose high-water mark is
then its own (Linux).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table

from pipelines.speed.memory import in_process
from pipelines.speed.timing import side_by_side
from shared.settings.objectives import KL, Distillation, ReverseCalm, Tidal
from shared.system.hardware import bfloat16_in_hardware
from student_train.losses.fused_head import LossSettings, fused_loss
from student_train.losses.objective import Counts, objective, total
from student_train.losses.targets import ChunkTargets, Classes, Targets, TopKTargets

_ROWS, _VOCABULARY, _WIDTH, _K, _CLASSES = 512, 151_936, 512, 32, 64
_OBJECTIVES: dict[str, Distillation] = {
    "kl + TIDAL": KL(tidal=Tidal()),
    "reverse_calm": ReverseCalm(),
}


@dataclass(frozen=True)
class _Case:
    objective: str
    share: float
    """Of the rows that are masked: the plain way makes logits of all."""
    half: bool
    """Products in bfloat16."""


def bench_head() -> Table:
    """The ratios as a table."""
    half = bfloat16_in_hardware(torch.device("cpu"))
    title = (
        f"LM head and loss ÷ plain over the whole sequence, forward and backward: {_ROWS:,} rows, "
        f"vocabulary {_VOCABULARY:,}, width {_WIDTH:,}, {'bfloat16' if half else 'float32'}"
    )
    table = Table(
        "objective", "rows masked", "time", "memory beyond inputs and gradients", title=title
    )
    for name in _OBJECTIVES:
        for share in (1.0, 0.5):
            case = _Case(name, share, half)
            jobs: dict[str, Callable[[], object]] = {
                way: _job(case, way) for way in ("plain", "fused")
            }
            seconds = side_by_side(jobs, rounds=2)
            memory = ""
            if share == 1.0:
                found = {way: max(1, in_process(_job, case, way)) for way in jobs}
                memory = f"{found['fused'] / found['plain']:.2f}"
            table.add_row(
                name, f"{share:.0%}", f"{seconds['fused'] / seconds['plain']:.2f}", memory
            )
    return table


def _job(case: _Case, way: str) -> Callable[[], None]:
    """One step. Its gradients and a second one of the head, which a loss adds up, are there before."""
    torch.manual_seed(0)
    hidden = torch.randn(_ROWS, _WIDTH, requires_grad=True)
    head = (torch.randn(_VOCABULARY, _WIDTH) * 0.02).requires_grad_()
    hidden.grad, head.grad = torch.zeros_like(hidden), torch.zeros_like(head)
    spare = torch.ones_like(head)
    del spare
    masked = round(_ROWS * case.share)
    targets = _problem(masked)
    counts = Counts(*torch.full((3,), float(masked)))
    settings = LossSettings(_OBJECTIVES[case.objective], 1.0, counts, 0.5)

    def run() -> None:
        half = torch.autocast("cpu", torch.bfloat16) if case.half else contextlib.nullcontext()
        with half:
            if way == "fused":
                loss, _ = fused_loss(hidden[:masked], head, targets, settings)
            else:
                logits = torch.nn.functional.linear(hidden, head)[:masked]
                sums = objective(logits, targets, settings.distillation, settings.progress)
                loss = total(sums, settings.counts, settings.distillation, settings.weight)
        loss.backward()

    return run


def _problem(rows: int) -> Targets:
    ids = torch.stack([torch.randperm(_VOCABULARY)[:_K] for _ in range(64)]).repeat(rows // 64, 1)
    logp = torch.randn(rows, _K).sort(dim=1, descending=True).values
    odds = {t: torch.zeros(rows) for t in (1.0, 2.0)}
    prior = torch.full((_VOCABULARY,), -math.log(_VOCABULARY))
    classes = Classes(torch.arange(_VOCABULARY) % _CLASSES, _CLASSES, {1.0: prior, 2.0: prior})
    mass = {t: torch.full((rows, _CLASSES), math.log(0.5 / _CLASSES)) for t in (1.0, 2.0)}
    topk = TopKTargets(
        ids, logp, torch.ones_like(ids, dtype=torch.bool), odds, classes, mass, student_shaped=False
    )
    places = np.arange(rows)
    chunk_of = places // 2
    chunks = ChunkTargets(
        torch.from_numpy(places), torch.from_numpy(chunk_of), -torch.rand(rows // 2), torch.rand(rows // 2) * 0.9 + 0.1,
        np.stack([places, chunk_of]),
    )  # fmt: skip
    return Targets(
        torch.randint(0, _VOCABULARY, (rows,)), torch.rand(rows) * 0.9 + 0.1, topk, chunks
    )
