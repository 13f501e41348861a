"""The reference engine: a stock transformers model in length-bucketed batches (DESIGN §7)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from teacher_cache.comp_demo import Request
from teacher_cache.engines.base import token_budget_batches
from teacher_cache.engines.inputs import build_inputs, width_of
from teacher_cache.targets import (
    Reading,
    Scores,
    TargetSpec,
    excluded_ids,
    extract,
    member_matrix,
    outside_sums,
    scores_of,
)
from teacher_cache.teachers.registry import Attention


class TransformersEngine:
    """Scores requests with `model`.

    `shift`: row i of the model predicts token i + 1 (Dream). `shared_ids`: only ids marked True enter a top-k.
    """

    def __init__(
        self,
        model: Any,
        attention: Attention,
        spec: TargetSpec,
        *,
        shift: bool = False,
        tokens_per_batch: int = 16384,
        head_rows: int = 1024,
        shared_ids: Bool[np.ndarray, " vocab"] | None = None,
    ) -> None:
        self._model = model.eval()
        self._attention = attention
        self._spec = spec
        self._shift = int(shift)
        self._tokens_per_batch = tokens_per_batch
        self._head_rows = head_rows
        self._excluded = None
        if shared_ids is not None:
            self._excluded = torch.from_numpy(excluded_ids(shared_ids, model.config.vocab_size))
        self._members: torch.Tensor | None = None
        self.forward_rows = 0
        """Rows for which the LM head ran, for the benchmark."""

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self._model.get_input_embeddings().weight.device

    def use_classes(self, class_of: Int[np.ndarray, " vocab"]) -> None:
        """From now on scores hold the masses of these classes (see `Engine`)."""
        classes = int(class_of.max()) + 1
        self._spec = dataclasses.replace(self._spec, classes=classes)
        self._members = member_matrix(class_of, classes) if classes > 1 else None

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> list[Scores]:
        """Scores of each request, in order (see `Engine`)."""
        results: list[Scores | None] = [None] * len(requests)
        for batch in self._batches(requests):
            for i, scores in zip(batch, self._score_batch([requests[i] for i in batch]), strict=True):
                results[i] = scores
        return [scores for scores in results if scores is not None]

    @torch.inference_mode()
    def outside(self, requests: Sequence[Request]) -> Float[np.ndarray, "temperatures vocab"]:
        """Sums of probabilities outside of the top-k (see `Engine`)."""
        total = np.zeros((len(self._spec.temperatures), self._model.config.vocab_size))
        for batch in self._batches(requests):
            for logits, _ in self._logits([requests[i] for i in batch]):
                total += outside_sums(logits, self._spec, self._shared_only(logits)).double().cpu().numpy()
        return total

    @torch.inference_mode()
    def logits(self, requests: Sequence[Request]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Full logits in float32 and gold ids at the read positions of each request, in host memory."""
        found = []
        for request in requests:
            parts = [(logits.float().cpu(), gold.cpu()) for logits, gold in self._logits([request])]
            found.append((torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])))
        return found

    def close(self) -> None:
        """Nothing to give back: the model goes with the engine."""

    def _batches(self, requests: Sequence[Request]) -> list[list[int]]:
        return token_budget_batches([width_of(self._attention, r) for r in requests], self._tokens_per_batch)

    def _logits(self, requests: Sequence[Request]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Logits and gold ids at the read positions of one batch, some rows at a time."""
        inputs = build_inputs(self._attention, requests).to(self.device)
        output = self._model.model(
            input_ids=inputs.ids, attention_mask=inputs.mask, position_ids=inputs.positions, use_cache=False
        )
        last = output.last_hidden_state  # under a device map on the last layer's device
        row = torch.from_numpy(np.repeat(np.arange(len(requests)), [len(r.read) for r in requests])).to(last.device)
        gold = torch.from_numpy(np.concatenate([r.gold for r in requests])).long()
        hidden = last[row, inputs.columns.to(last.device) - self._shift]
        self.forward_rows += len(gold)
        for i in range(0, len(gold), self._head_rows):
            logits = self._model.lm_head(hidden[i : i + self._head_rows])
            yield logits, gold[i : i + self._head_rows].to(logits.device)

    def _score_batch(self, requests: Sequence[Request]) -> list[Scores]:
        parts = []
        for logits, gold in self._logits(requests):
            if self._members is not None:
                self._members = self._members.to(logits.device)
            parts.append(extract(logits, gold, self._spec, self._shared_only(logits), self._members))
        ends = np.cumsum([len(r.read) for r in requests])[:-1]
        columns = [
            np.split(torch.cat([getattr(part, field.name) for part in parts]).cpu().numpy(), ends)
            for field in dataclasses.fields(Reading)
        ]
        return [scores_of(list(cells), self._spec) for cells in zip(*columns, strict=True)]

    def _shared_only(self, logits: torch.Tensor) -> torch.Tensor | None:
        """The ids that are left out, where the logits are."""
        if self._excluded is not None:
            self._excluded = self._excluded.to(logits.device)
        return self._excluded
