"""A sample of the data with the teacher's full logits, from which the cache of any settings can be made."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from shared.cache.row import CacheRow, Layout
from shared.cache.shards import Unit
from shared.cache.vocabulary import Vocabulary
from shared.system.errors import TideError
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.method.targets import (
    Scores,
    TargetSpec,
    excluded_ids,
    extract,
    member_matrix,
    outside_sums,
)
from teacher_cache.run.load_engine import load_engine
from teacher_cache.run.open import Run
from teacher_cache.run.tables import classes_for
from teacher_cache.run.work import UnitWork, finish_unit, prepare_unit


@dataclass
class Sample:
    """Two halves of a sample: one for the priors, one to be cached. Full logits in float32, request by request."""

    plan: Run
    fit: list[tuple[Tensor, Tensor]]
    """Logits and gold ids."""
    work: UnitWork
    logits: list[tuple[Tensor, Tensor]]
    _classes: dict[int, np.ndarray] = field(default_factory=dict)

    def read_logits(self) -> Tensor:
        """Full logits of the half to be cached, in the order of its rows' positions."""
        parts, at = [], 0
        for item in self.work.items:
            whole = torch.zeros(item.view.positions.size, self.logits[0][0].shape[1])
            for rows in item.rows:
                whole[torch.from_numpy(rows)] = self.logits[at][0]
                at += 1
            parts.append(whole)
        return torch.cat(parts)

    def cached(self, k: int, classes: int) -> tuple[Layout, list[CacheRow]]:
        """The rows of a cache with these settings. TideError where there are not so many tokens."""
        targets = dataclasses.replace(self.plan.config.targets, k=k, classes=classes)
        plan = dataclasses.replace(
            self.plan, config=dataclasses.replace(self.plan.config, targets=targets)
        )
        width = self.logits[0][0].shape[1]
        if k > width:
            raise TideError(
                f"k {k} is more than the {width} tokens of the vocabulary", expected=f"1 to {width}"
            )
        spec = TargetSpec(k, 1.0, targets.stored_temperatures)
        if classes not in self._classes:
            self._classes[classes] = classes_for(plan)[0]
        class_of = self._classes[classes]
        plan = dataclasses.replace(plan, vocabulary=self._vocabulary(spec, class_of))
        members = member_matrix(class_of, classes) if classes > 1 else None
        spec = dataclasses.replace(spec, classes=classes)
        scores = []
        for logits, gold in self.logits:
            fields = extract(logits, gold, spec, self._excluded(), members)
            scores.append(Scores(**{name: cells.numpy() for name, cells in fields.items()}))
        return plan.layout, finish_unit(plan, self.work, scores)[0]

    def _excluded(self) -> Tensor:
        shared = self.plan.shared_ids()
        assert shared is not None
        return torch.from_numpy(excluded_ids(shared, self.plan.checkpoint.embedding_rows))

    def _vocabulary(self, spec: TargetSpec, class_of: np.ndarray) -> Vocabulary:
        """Priors and ranks from the half that is not looked at."""
        total, ids, excluded = (
            np.zeros((len(spec.temperatures), class_of.size)),
            [],
            self._excluded(),
        )
        for logits, gold in self.fit:
            ids.append(extract(logits, gold, spec, excluded)["topk_ids"].numpy().reshape(-1))
            total += outside_sums(logits, spec, excluded).double().numpy()
        return Vocabulary.of(
            class_of, total, sum(len(gold) for _, gold in self.fit), np.concatenate(ids)
        )


def take_sample(plan: Run, examples: int) -> Sample:
    """The first examples of the data under their first draw, every other one for the priors. TideError where nothing of
    them is masked, or another engine than transformers is asked for.
    """
    chosen = plan.data.between(0, min(examples, plan.data.examples))
    halves = [prepare_unit(plan, Unit(0, 0), part) for part in (chosen[1::2], chosen[0::2])]
    if not all(half.requests for half in halves):
        raise TideError(
            "no example of the data has a masked token", fix="take more examples"
        )
    with closing(load_engine(plan)) as engine:
        if not isinstance(engine, TransformersEngine):
            raise TideError(
                "full logits come from the transformers engine alone",
                fix="use --set engine.type=transformers",
            )
        fit, read = (engine.logits(half.requests) for half in halves)
    return Sample(plan, fit, halves[1], read)
