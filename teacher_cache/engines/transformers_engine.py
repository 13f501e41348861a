"""The reference engine: a stock transformers model in length-bucketed batches (DESIGN §7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from teacher_cache.comp_demo import Request
from teacher_cache.engines.base import token_budget_batches
from teacher_cache.engines.inputs import build_inputs, width_of
from teacher_cache.targets import Scores, TargetSpec, excluded_ids, extract
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
        self.forward_rows = 0
        """Rows for which the LM head ran, for the benchmark."""

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self._model.get_input_embeddings().weight.device

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> list[Scores]:
        """Scores of each request, in order (see `Engine`)."""
        results: list[Scores | None] = [None] * len(requests)
        widths = [width_of(self._attention, request) for request in requests]
        for batch in token_budget_batches(widths, self._tokens_per_batch):
            for i, scores in zip(batch, self._score_batch([requests[i] for i in batch]), strict=True):
                results[i] = scores
        return [scores for scores in results if scores is not None]

    def close(self) -> None:
        """Nothing to give back: the model goes with the engine."""

    def _score_batch(self, requests: Sequence[Request]) -> list[Scores]:
        inputs = build_inputs(self._attention, requests).to(self.device)
        output = self._model.model(
            input_ids=inputs.ids, attention_mask=inputs.mask, position_ids=inputs.positions, use_cache=False
        )
        sizes = [len(r.read) for r in requests]
        last = output.last_hidden_state  # under a device map on the last layer's device
        row = torch.from_numpy(np.repeat(np.arange(len(requests)), sizes)).to(last.device)
        gold = torch.from_numpy(np.concatenate([r.gold for r in requests])).long()
        hidden = last[row, inputs.columns.to(last.device) - self._shift]
        parts = [
            self._extract(hidden[part], gold[part])
            for part in (slice(i, i + self._head_rows) for i in range(0, len(gold), self._head_rows))
        ]
        self.forward_rows += len(gold)
        columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
        return [
            self._pack(*cells) for cells in zip(*(np.split(c, np.cumsum(sizes)[:-1]) for c in columns), strict=True)
        ]

    def _extract(self, hidden: torch.Tensor, gold: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = self._model.lm_head(hidden)
        if self._excluded is not None:
            self._excluded = self._excluded.to(logits.device)
        return extract(logits, gold.to(logits.device), self._spec, self._excluded)

    def _pack(self, gold: np.ndarray, lse: np.ndarray, sizes: np.ndarray, ids: np.ndarray, top: np.ndarray) -> Scores:
        if not self._spec.k:
            return Scores(gold, lse, None, None, None)
        return Scores(gold, lse, sizes.astype(np.int32), ids.astype(np.int32), top)
