"""The reference engine: a stock transformers model. Under full attention sequences lie one behind the other, without
padding and mask; elsewhere passes over one text share what they have in common (DESIGN §7).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from shared.models.loading import compile_layers
from shared.models.packed_attention import use_packed_attention
from teacher_cache.engines.packs import Batch, Pack, lay_out, one_behind_the_other, side_by_side
from teacher_cache.method.comp_demo import Request
from teacher_cache.method.targets import (
    Reading,
    Scores,
    TargetSpec,
    excluded_ids,
    extract,
    member_matrix,
    outside_sums,
    scores_of,
)
from teacher_cache.teachers.registry import Attention, Full


class TransformersEngine:
    """Scores requests with `model`.

    `shift`: row i of the model predicts token i + 1 (Dream). `shared_ids`: only ids marked True enter a top-k.
    `compiled`: decoder layers by torch.compile.
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
        compiled: bool = False,
    ) -> None:
        self._model = model.eval()
        self._packed = isinstance(attention, Full)
        if self._packed:
            use_packed_attention(model)
        if compiled:
            compile_layers(model)
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
        self.trunk_rows = 0
        """Rows that the layers ran, padding included."""

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
        for packs in self.batches(requests):
            for i, scores in zip(_members(packs), self._score_batch(packs, requests), strict=True):
                results[i] = scores
        return [scores for scores in results if scores is not None]

    @torch.inference_mode()
    def outside(self, requests: Sequence[Request]) -> Float[np.ndarray, "temperatures vocab"]:
        """Sums of probabilities outside of the top-k (see `Engine`)."""
        total = np.zeros((len(self._spec.temperatures), self._model.config.vocab_size))
        for packs in self.batches(requests):
            for logits, _ in self._logits(packs, requests):
                total += (
                    outside_sums(logits, self._spec, self._shared_only(logits))
                    .double()
                    .cpu()
                    .numpy()
                )
        return total

    @torch.inference_mode()
    def logits(self, requests: Sequence[Request]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Full logits in float32 and gold ids at the read positions of each request, in host memory."""
        found = []
        for request in requests:
            (packs,) = self.batches([request])
            parts = [
                (logits.float().cpu(), gold.cpu())
                for logits, gold in self._logits(packs, [request])
            ]
            found.append((torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts])))
        return found

    def close(self) -> None:
        """Nothing to give back: the model goes with the engine."""

    def batches(self, requests: Sequence[Request]) -> list[list[Pack]]:
        """The packs of each forward pass."""
        width = int(self._model.config.hidden_size)
        return lay_out(self._attention, requests, self._shift, self._tokens_per_batch, width)

    def batch(self, packs: Sequence[Pack]) -> Batch:
        """The tensors of one forward pass."""
        return (one_behind_the_other if self._packed else side_by_side)(packs, self.device)

    def hidden(self, batch: Batch) -> Float[torch.Tensor, "read width"]:
        """Last hidden states at the read positions, in the order of the packs."""
        output = self._model.model(**batch.arguments, use_cache=False)
        last = output.last_hidden_state  # under a device map on the last layer's device
        return last[batch.row.to(last.device), batch.column.to(last.device)]

    def _logits(
        self, packs: Sequence[Pack], requests: Sequence[Request]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Logits and gold ids at the read positions of one batch, some rows at a time."""
        batch = self.batch(packs)
        hidden = self.hidden(batch)
        gold = (
            torch.from_numpy(np.concatenate([requests[i].gold for i in _members(packs)]))
            .long()
            .to(hidden.device)
        )
        self.forward_rows += len(gold)
        self.trunk_rows += batch.rows
        for i in range(0, len(gold), self._head_rows):
            logits = self._model.lm_head(hidden[i : i + self._head_rows])
            yield logits, gold[i : i + self._head_rows].to(logits.device)

    def readings(self, packs: Sequence[Pack], requests: Sequence[Request]) -> list[Reading]:
        """What is kept of one batch's logits, on the device, some rows at a time."""
        parts = []
        for logits, gold in self._logits(packs, requests):
            if self._members is not None:
                self._members = self._members.to(logits.device)
            parts.append(
                extract(logits, gold, self._spec, self._shared_only(logits), self._members)
            )
        return parts

    def _score_batch(self, packs: Sequence[Pack], requests: Sequence[Request]) -> list[Scores]:
        parts = self.readings(packs, requests)
        ends = np.cumsum([len(requests[i].read) for i in _members(packs)])[:-1]
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


def _members(packs: Sequence[Pack]) -> list[int]:
    """The numbers of the requests of a batch, in the order in which they are read."""
    return [i for pack in packs for i in pack.members]
