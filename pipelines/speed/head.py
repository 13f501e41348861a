"""The fused head against the plain one at a real vocabulary: time and memory beyond inputs and gradients.

Each runs in a process of its own, so that the high-water mark of its memory is its own (Linux).
"""

from __future__ import annotations

import math
import multiprocessing
import time
from multiprocessing.connection import Connection

import torch
from rich.table import Table

from pipelines.speed.memory import high_water
from shared.objectives import KL, Distillation, NoDistillation, Tidal
from student_train.losses.fused_head import LossSettings, fused_loss
from student_train.losses.objective import Counts, objective, total
from student_train.losses.targets import Classes, Targets, TopKTargets

_ROWS, _VOCABULARY, _WIDTH, _K, _CLASSES = 4096, 151_936, 1024, 64, 64
_OBJECTIVES: dict[str, Distillation] = {"CE only": NoDistillation(), "kl + TIDAL": KL(tidal=Tidal())}


def bench_head() -> Table:
    """The ratios as a table."""
    title = f"LM head and loss, forward and backward: {_ROWS:,} rows, vocabulary {_VOCABULARY:,}, width {_WIDTH:,}"
    table = Table("objective", "time ÷ plain", "memory beyond inputs and gradients ÷ plain", title=title)
    for name in _OBJECTIVES:
        found = {}
        for way in ("plain", "fused"):
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            process = multiprocessing.get_context("spawn").Process(target=_measure, args=(name, way, theirs))
            process.start()
            theirs.close()
            found[way] = ours.recv()
            process.join()
        (plain_time, plain_memory), (time_, memory) = found["plain"], found["fused"]
        table.add_row(name, f"{time_ / plain_time:.2f}", f"{memory / plain_memory:.3f}")
    return table


def _measure(name: str, way: str, result: Connection) -> None:
    """Seconds of one step, and bytes at its peak beyond what inputs and gradients take."""
    torch.manual_seed(0)
    hidden = torch.randn(_ROWS, _WIDTH, requires_grad=True)
    head = (torch.randn(_VOCABULARY, _WIDTH) * 0.02).requires_grad_()
    hidden.grad, head.grad = torch.zeros_like(hidden), torch.zeros_like(head)
    # A loss adds its gradient to one that is there: this second one is part of what gradients cost.
    spare = torch.ones_like(head)
    targets, settings = _problem(), LossSettings(_OBJECTIVES[name], 1.0, Counts(*torch.full((3,), float(_ROWS))), 0.5)
    before = high_water()
    del spare
    started = time.perf_counter()
    if way == "fused":
        loss, _ = fused_loss(hidden, head, targets, settings)
    else:
        sums = objective(hidden @ head.T, targets, settings.distillation, settings.progress)
        loss = total(sums, settings.counts, settings.distillation, settings.weight)
    loss.backward()
    result.send((time.perf_counter() - started, max(1, high_water() - before)))


def _problem() -> Targets:
    ids = torch.stack([torch.randperm(_VOCABULARY)[:_K] for _ in range(64)]).repeat(_ROWS // 64, 1)
    logp = torch.randn(_ROWS, _K).sort(dim=1, descending=True).values
    odds = {t: torch.zeros(_ROWS) for t in (1.0, 2.0)}
    prior = torch.full((_VOCABULARY,), -math.log(_VOCABULARY))
    classes = Classes(torch.arange(_VOCABULARY) % _CLASSES, _CLASSES, {1.0: prior, 2.0: prior})
    mass = {t: torch.full((_ROWS, _CLASSES), math.log(0.5 / _CLASSES)) for t in (1.0, 2.0)}
    topk = TopKTargets(ids, logp, torch.ones_like(ids, dtype=torch.bool), odds, classes, mass, student_shaped=False)
    return Targets(torch.randint(0, _VOCABULARY, (_ROWS,)), torch.rand(_ROWS) * 0.9 + 0.1, topk)
