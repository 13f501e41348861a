"""`tide gradients`: where a training's first steps would lead, before any is made.

A training goes down the gradient of cross-entropy + weight · distillation, and is judged by the
held-out NLL: here the gradients of all three are compared, by all parameters of the student.
"""

import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from shared.settings.config import Gold, NoDistillation, TrainConfig
from shared.system.files import TideError
from student_train.batches.collate import Batch, counts_of
from student_train.losses.objective import Counts, LossSettings
from student_train.training.heldout import HeldOut
from student_train.training.trainer import StudentTrainer, make_trainer

PROGRESS = 0.5  # halfway through training, where TIDAL mixes
BATCHES = 16  # at least, if there are so many rows: errors come from how batches differ


@dataclass(frozen=True)
class Line:
    """One term of the loss. A cosine with the held-out gradient is an array: each batch's part."""

    temperature: float | None  # None: cross-entropy
    size: float  # the gradient's norm ÷ cross-entropy's
    alone: np.ndarray
    sums: dict[float, np.ndarray]  # by weight: of cross-entropy + weight · distillation


@dataclass(frozen=True)
class Gradients:
    lines: list[Line]  # cross-entropy, then the distillation at each temperature
    masked: np.ndarray  # tokens, by batch

    def error(self, cosine: np.ndarray) -> float:
        """The standard error of a cosine, or of a difference of two, as the sample's rows vary."""
        rest = cosine - self.masked / self.masked.sum() * cosine.sum()
        return math.sqrt(len(rest) / (len(rest) - 1) * (rest @ rest))


def measure_gradients(
    config: TrainConfig, temperatures: list[float], weights: list[float], rows: int
) -> Gradients:
    """On the first `rows` rows that a run of these settings sees, all of the first draw."""
    if isinstance(config.distillation, NoDistillation | Gold):
        what = f"distillation.type is {config.distillation.type}, which has no temperature"
        raise TideError(what, expected="kl, reverse_kl, calm or reverse_calm")
    if config.heldout is None:
        raise TideError("heldout, whose gradient is the measure, is not set", fix="name a source")
    size = max(1, min(config.batch_size, rows // BATCHES))
    changes: dict[str, Any] = {"batch_size": size, "global_batch": None, "accumulation": 1}
    changes |= {"draws_per_step": 1, "compile": "off", "report_to": ()}
    with tempfile.TemporaryDirectory(prefix="tide-gradients-") as folder:
        trainer, _ = make_trainer(replace(config, **changes, out=Path(folder)))
    assert trainer.model is not None
    if config.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore
    data: Any = trainer.train_dataset
    batches = [data[i] for i in range(min(math.ceil(rows / size), data.batches_in(0)))]
    return compare(trainer, batches, temperatures, weights)


def compare(
    trainer: StudentTrainer, batches: list[Batch], temperatures: list[float], weights: list[float]
) -> Gradients:
    """The gradients over `batches`, all as one."""
    masked = np.array([batch["gold"].numel() for batch in batches])
    if len(batches) < 2 or not masked.any():
        what = f"the sample has {masked.sum()} masked tokens, in {len(batches)} batches"
        raise TideError(what, expected="some, in two at least", fix="take more rows")
    # 1. The direction of the held-out gradient.
    nothing, one = NoDistillation(), torch.ones((), device=trainer.accelerator.device)
    parts = heldout_parts(trainer.heldout, trainer.config.batch_size)
    add_up(trainer, parts, LossSettings(nothing, 0.0, Counts(one, one, one), PROGRESS))
    ahead = gradient_of(trainer)
    length = dot(ahead, ahead) ** 0.5
    for part in ahead:
        part.div_(length)
    # 2. Cross-entropy.
    counts = counts_of(torch.stack([b["counts"] for b in batches]).sum(dim=0).to(one.device))
    along = add_up(trainer, batches, LossSettings(nothing, 0.0, counts, PROGRESS), ahead)
    ce = gradient_of(trainer)
    ce_norm = dot(ce, ce) ** 0.5
    lines = [Line(None, 1.0, along / ce_norm, {})]
    # 3. The distillation alone: cross-entropy is divided by infinity.
    counts = replace(counts, maskable=one * math.inf)
    for temperature in temperatures:
        kind: Any = replace(trainer.config.distillation, temperature=temperature)  # type: ignore
        here = add_up(trainer, batches, LossSettings(kind, 1.0, counts, PROGRESS), ahead)
        own, sums = gradient_of(trainer), {}
        norm, both = dot(own, own) ** 0.5, dot(own, ce)
        for w in weights:
            length = (ce_norm**2 + 2 * w * both + (w * norm) ** 2) ** 0.5
            sums[w] = (along + w * here) / length
        lines.append(Line(temperature, norm / ce_norm, here / (norm or 1.0), sums))
    return Gradients(lines, masked)


def heldout_parts(heldout: HeldOut | None, size: int) -> Iterator[Batch]:
    """Its batches in parts of `size` rows, for a loss that weighs all tokens alike."""
    assert heldout is not None
    for batch in heldout.batches:
        for start in range(0, len(batch["clean"]), size):
            part = {k: batch[k][start : start + size] for k in ("clean", "noised", "places")}
            mine = (batch["row"] >= start) & (batch["row"] < start + size)
            row, column, place = (batch[k][mine] for k in ("row", "column", "place"))
            # Places, and the entries among them, count on through the examples.
            before = start * (part["clean"].shape[1] + part["noised"].shape[1])
            part["places"] = (part["places"] - before).clamp(min=-1)
            place = place - start * part["places"].shape[1]
            part |= {"place": place, "t": torch.ones(len(row))}
            yield {**part, "gold": batch["clean"][row, column]}


def add_up(
    trainer: StudentTrainer, batches: Iterable[Batch], settings: LossSettings, ahead: Any = None
) -> np.ndarray:
    """Leaves the gradient of all batches in the parameters; how far each goes along `ahead`."""
    model: Any = trainer.model
    model.train().zero_grad()
    device, reached = trainer.accelerator.device, [0.0]
    for given in tqdm(batches, unit="batch", leave=False):
        batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in given.items()}
        with trainer.accelerator.autocast():
            loss, _ = model(batch=batch, settings=settings)
        loss.backward()
        reached.append(0.0 if ahead is None else dot(gradient_of(trainer), ahead))
    return np.diff(reached)


def gradient_of(trainer: StudentTrainer) -> list[torch.Tensor]:
    """What `add_up` left, by parameter."""
    model: Any = trainer.model
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def dot(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return float(sum((a * b).sum(dtype=torch.float64) for a, b in zip(one, other, strict=True)))


def table(found: Gradients, kind: str) -> list[str]:
    """The gradients in lines of Markdown, and what follows from them."""
    first, *others = found.lines
    losses = [(x, line.temperature, w) for line in others for w, x in line.sums.items()]
    losses.append((first.alone, None, 0.0))
    best, temperature, weight = max(losses, key=lambda loss: loss[0].sum())

    def cell(cosine: np.ndarray) -> str:
        near = (best - cosine).sum() <= 2 * found.error(best - cosine)
        return f"{cosine.sum():.3f}{' *' if near else ''}"

    weights = [f"weight {w:g}" for w in others[0].sums]
    rows = [["gradient of", "size", "cosine", "±", *weights], ["---"] * (4 + len(weights))]
    for line in found.lines:
        alone = cell(line.alone) if line is first else f"{line.alone.sum():.3f}"
        name = "cross-entropy" if line is first else f"{kind}, T {line.temperature:g}"
        sums = [cell(x) for x in line.sums.values()] or [""] * len(weights)
        rows.append([name, f"{line.size:.2f}", alone, f"{found.error(line.alone):.3f}", *sums])
    which = f"T {temperature:g}, weight {weight:g}" if weight else "Cross-entropy alone"
    said = f"{which}: the highest cosine, {best.sum():.3f}; * is within two standard errors of it."
    return [*(f"| {' | '.join(row)} |" for row in rows), "", said]
