"""The reference engine: a stock transformers model.

Requests are packed and batched (`packs`), run through the layers, and the LM head reads some rows
at a time: what is kept of their logits leaves the device, the logits never do.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shared.models.loading import compile_layers
from shared.models.packed_attention import use_packed_attention
from teacher_cache.engines.packs import Batch, Pack, lay_out, one_behind_the_other, side_by_side
from teacher_cache.method.comp_demo import Request
from teacher_cache.method.targets import (
    Scores,
    TargetSpec,
    excluded_ids,
    extract,
    member_matrix,
    outside_sums,
)
from teacher_cache.teachers.registry import Attention, Full


class TransformersEngine:
    """Scores requests with `model` (see `Engine`).

    `shift`: row i of the model predicts token i + 1 (Dream). `shared_ids`: only ids marked True
    enter a top-k. `compiled`: decoder layers by torch.compile. `forward_rows` counts
    the rows that the LM head ran.
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
        if isinstance(attention, Full):
            use_packed_attention(model)
        if compiled:
            compile_layers(model)
        self._attention = attention
        self._spec = spec
        self._shift = int(shift)
        self._tokens_per_batch = tokens_per_batch
        self._head_rows = head_rows
        self._excluded: Tensor | None = None
        if shared_ids is not None:
            self._excluded = torch.from_numpy(excluded_ids(shared_ids, model.config.vocab_size))
        self._members: Tensor | None = None
        self.forward_rows = 0

    def use_classes(self, class_of: Int[np.ndarray, " vocab"]) -> None:
        classes = int(class_of.max()) + 1
        self._spec = dataclasses.replace(self._spec, classes=classes)
        self._members = member_matrix(class_of, classes) if classes > 1 else None

    @torch.inference_mode()
    def score(self, requests: Sequence[Request]) -> list[Scores]:
        scores: dict[int, Scores] = {}
        for packs in self.batches(requests):
            # 1. What is kept of all rows of the batch, field by field.
            parts = self.readings(packs, requests)
            # 2. Cut where one request's rows end and the next one's begin.
            members = _members(packs)
            ends = np.cumsum([len(requests[i].read) for i in members])[:-1]
            fields = {}
            for name in parts[0]:
                whole = torch.cat([part[name] for part in parts]).cpu().numpy()
                fields[name] = np.split(whole, ends)
            for n, i in enumerate(members):
                scores[i] = Scores(**{name: cells[n] for name, cells in fields.items()})
        return [scores[i] for i in range(len(requests))]

    @torch.inference_mode()
    def outside(self, requests: Sequence[Request]) -> Float[np.ndarray, "temperatures vocab"]:
        total = np.zeros((len(self._spec.temperatures), self._model.config.vocab_size))
        for packs in self.batches(requests):
            for logits, _ in self._logits(packs, requests):
                sums = outside_sums(logits, self._spec, self._excluded)
                total += sums.double().cpu().numpy()
        return total

    @torch.inference_mode()
    def logits(self, requests: Sequence[Request]) -> list[tuple[Tensor, Tensor]]:
        """Full logits in float32 and gold ids at the read positions of each request, on the CPU."""
        results = []
        for request in requests:
            (packs,) = self.batches([request])
            logits, gold = zip(*self._logits(packs, [request]), strict=True)
            results.append((torch.cat(logits).float().cpu(), torch.cat(gold).cpu()))
        return results

    def close(self) -> None:
        """Nothing to give back: the model goes with the engine."""

    def batches(self, requests: Sequence[Request]) -> list[list[Pack]]:
        """The packs of each forward pass."""
        return lay_out(self._attention, requests, self._shift, self._tokens_per_batch)

    def batch(self, packs: Sequence[Pack]) -> Batch:
        """The tensors of one forward pass."""
        device = self._model.get_input_embeddings().weight.device
        make = one_behind_the_other if isinstance(self._attention, Full) else side_by_side
        return make(packs, device)

    def hidden(self, batch: Batch) -> Float[Tensor, "read width"]:
        """Last hidden states at the read positions, in the order of the packs."""
        output = self._model.model(**batch.arguments, use_cache=False)
        last = output.last_hidden_state  # under a device map on the last layer's device
        return last[batch.row.to(last.device), batch.column.to(last.device)]

    def _logits(
        self, packs: Sequence[Pack], requests: Sequence[Request]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits and gold ids at the read positions of one batch, some rows at a time."""
        batch = self.batch(packs)
        hidden = self.hidden(batch)
        gold = np.concatenate([requests[i].gold for i in _members(packs)]).astype(np.int64)
        answers = torch.from_numpy(gold).to(hidden.device)
        self.forward_rows += len(gold)
        for start in range(0, len(gold), self._head_rows):
            rows = slice(start, start + self._head_rows)
            logits = self._model.lm_head(hidden[rows])
            if self._excluded is not None:  # moved once, to where the head is
                self._excluded = self._excluded.to(logits.device)
            if self._members is not None:
                self._members = self._members.to(logits.device)
            yield logits, answers[rows].to(logits.device)

    def readings(
        self, packs: Sequence[Pack], requests: Sequence[Request]
    ) -> list[dict[str, Tensor]]:
        """What is kept of one batch's logits (see `extract`), some rows at a time."""
        parts = []
        for logits, gold in self._logits(packs, requests):
            parts.append(extract(logits, gold, self._spec, self._excluded, self._members))
        return parts


def _members(packs: Sequence[Pack]) -> list[int]:
    """The numbers of the requests of a batch, in the order in which they are read."""
    return [i for pack in packs for i in pack.members]
