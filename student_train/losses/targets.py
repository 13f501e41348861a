"""What the losses need to know of the teacher, as tensors: at each masked position, in each active chunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Classes:
    """The vocabulary as the cache cuts it. `class_of` is −1 at ids that student and teacher do not share."""

    class_of: Int[Tensor, " vocab"]
    count: int
    log_prior: Mapping[float, Float[Tensor, " vocab"]]
    """Log of the teacher's mean probability outside its top-k, in nats, by temperature."""


@dataclass(frozen=True)
class TopKTargets:
    """The teacher at the first n of the masked positions: all, or those at which it was read.

    `kept` is False at padding, where `ids` repeats a kept id of the row.
    """

    ids: Int[Tensor, "n k"]
    logp: Float[Tensor, "n k"]
    """Log-probabilities at T = 1 in nats, up to a constant of the row."""
    kept: Bool[Tensor, "n k"]
    odds: Mapping[float, Float[Tensor, " n"]]
    """Log-odds of the mass outside the top-k, by temperature."""
    classes: Classes | None = None
    """None: one class, of a vocabulary that is shared whole, and a tail that is shaped by the student."""
    class_mass: Mapping[float, Float[Tensor, "n classes"]] | None = None
    """Log-masses of the classes outside the top-k, by temperature; None: one class."""
    student_shaped: bool = True
    """Inside a class the teacher is taken proportional to the student; else to the prior."""


@dataclass(frozen=True)
class ChunkTargets:
    """Active chunks. Token j of the chunks stands at masked row `rows[j]` and belongs to chunk `chunk_of[j]`.

    Both rise with j. `host` is the two as rows of one array in host memory, where there is one: to cut slices without
    waiting for the device.
    """

    rows: Int[Tensor, " tokens"]
    chunk_of: Int[Tensor, " tokens"]
    teacher_logp: Float[Tensor, " chunks"]
    t: Float[Tensor, " chunks"]
    host: np.ndarray | None = None


@dataclass(frozen=True)
class Targets:
    """All that the losses need to know about a batch, besides the student's logits at its masked positions.

    `topk` may have fewer rows than there are positions: then the teacher was not read at the last ones.
    """

    gold: Int[Tensor, " n"]
    t: Float[Tensor, " n"]
    topk: TopKTargets | None = None
    chunks: ChunkTargets | None = None


def rows_of(topk: TopKTargets, part: slice) -> TopKTargets:
    """The targets of some rows: views."""
    mass = None if topk.class_mass is None else {t: m[part] for t, m in topk.class_mass.items()}
    odds = {t: values[part] for t, values in topk.odds.items()}
    return TopKTargets(
        topk.ids[part],
        topk.logp[part],
        topk.kept[part],
        odds,
        topk.classes,
        mass,
        topk.student_shaped,
    )
