"""Head and loss in slices against plain logits of whole sequences, at a real vocabulary: time and
memory.
"""

import contextlib
import math
from collections.abc import Callable

import numpy as np
import torch
from rich.table import Table

from pipelines.speed.timing import added_memory, in_process, side_by_side
from shared.settings.objectives import KL, Distillation, ReverseCalm, Tidal
from shared.system.hardware import bfloat16_in_hardware
from student_train.losses.objective import Counts, LossSettings, fused_loss, objective, total
from student_train.losses.targets import ChunkTargets, Classes, Targets, TopKTargets

ROWS, VOCABULARY, WIDTH, K, CLASSES = 512, 151_936, 512, 32, 64
OBJECTIVES: dict[str, Distillation] = {
    "kl + TIDAL": KL(tidal=Tidal()),
    "reverse_calm": ReverseCalm(),
}


def bench_head(vocabulary: int = VOCABULARY) -> Table:
    """Time and memory in slices ÷ plain."""
    half = bfloat16_in_hardware(torch.device("cpu"))
    title = (
        f"LM head and loss in slices ÷ plain over the whole sequence, forward and backward: "
        f"{ROWS} rows, {vocabulary:,} tokens, width {WIDTH}, {'bfloat16' if half else 'float32'}"
    )
    table = Table(
        "objective", "rows masked", "time", "memory beyond inputs and gradients", title=title
    )
    for name in OBJECTIVES:
        for masked in (ROWS, ROWS // 2):
            case = (name, masked, vocabulary, half)
            jobs = {way: head_job(way, *case) for way in ("plain", "sliced")}
            seconds = side_by_side(jobs, rounds=2)
            memory = ""
            if masked == ROWS:
                bytes_of = {
                    way: max(1, in_process(added_memory, head_job, way, *case)) for way in jobs
                }
                memory = f"{bytes_of['sliced'] / bytes_of['plain']:.2f}"
            share, time = masked / ROWS, seconds["sliced"] / seconds["plain"]
            table.add_row(name, f"{share:.0%}", f"{time:.2f}", memory)
    return table


def head_job(
    way: str, objective_name: str, masked: int, vocabulary: int, half: bool
) -> Callable[[], object]:
    """A step of head and loss, `plain` or `sliced`. Its gradients are there before it, as in
    accumulation.
    """
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    head = (torch.randn(vocabulary, WIDTH) * 0.02).requires_grad_()
    hidden.grad, head.grad = torch.zeros_like(hidden), torch.zeros_like(head)
    torch.ones_like(head)  # a second gradient of the head, which a loss adds up, is no news later
    targets = made_up_targets(masked, vocabulary)
    counts = Counts(*torch.full((3,), float(masked)))
    settings = LossSettings(OBJECTIVES[objective_name], 1.0, counts, 0.5)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
            if way == "sliced":
                loss, _ = fused_loss(hidden[:masked], head, targets, settings)
            else:  # logits of all rows, of which the masked ones are read
                logits = torch.nn.functional.linear(hidden, head)[:masked]
                sums = objective(logits, targets, settings.distillation, settings.progress)
                loss = total(sums, counts, settings.distillation, settings.weight)
        loss.backward()

    return run


def made_up_targets(rows: int, vocabulary: int) -> Targets:
    """Random targets of a top-k with classes, and chunks of two tokens."""
    ids = torch.randint(0, vocabulary, (rows, K))
    logp = torch.randn(rows, K).sort(dim=1, descending=True).values
    kept = torch.ones_like(ids, dtype=torch.bool)
    prior = torch.full((vocabulary,), -math.log(vocabulary))
    classes = Classes(torch.arange(vocabulary) % CLASSES, CLASSES, {1.0: prior, 2.0: prior})
    odds = {t: torch.zeros(rows) for t in (1.0, 2.0)}
    mass = {t: torch.full((rows, CLASSES), math.log(0.5 / CLASSES)) for t in (1.0, 2.0)}
    topk = TopKTargets(ids, logp, kept, odds, classes, mass, student_shaped=False)
    places = np.arange(rows)
    host = np.stack([places, places // 2])  # rows, and each row's chunk
    t = torch.rand(rows) * 0.9 + 0.1
    student, of_chunk = torch.from_numpy(host)
    chunks = ChunkTargets(student, of_chunk, -torch.rand(rows // 2), t[::2], host)
    return Targets(torch.randint(0, vocabulary, (rows,)), t, topk, chunks)
