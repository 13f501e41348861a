"""The pooler of every scorer: hidden states at the requested rows → LM head → top-k, logsumexp, gold logit."""

# pyright: reportMissingImports=false
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Set
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.model_executor.layers.pooler import Pooler
from vllm.tasks import PoolingTask
from vllm.v1.pool.metadata import PoolingMetadata

from teacher_cache.engines.vllm_engine.packing import columns, pack
from teacher_cache.method.targets import TargetSpec, extract, member_matrix, outside_sums

TASK: PoolingTask = "token_classify"


class ScorePooler(Pooler):
    """Runs the LM head at the rows that requests name in `extra_kwargs`, and at no other.

    `positions` are rows of the request's own sequence, `gold` the token ids there, `classes` (where named) a file with
    every token's class. A request with `outside` gets sums of probabilities outside of the top-k instead. Requests
    of one step share the head's passes, `head_rows` rows at a time.
    """

    rows_run: ClassVar[int] = 0
    """Rows for which the LM head ran in this process, for the benchmark and the tests."""

    def __init__(
        self,
        compute_logits: Callable[[torch.Tensor], torch.Tensor | None],
        settings: dict[str, Any],
    ) -> None:
        super().__init__()
        self._compute_logits = (
            compute_logits  # a bound method: the model does not become a child of its pooler
        )
        self._spec = TargetSpec(settings["k"], settings["mass"], tuple(settings["temperatures"]))
        self._shift = int(settings["shift"])
        self._head_rows = int(settings["head_rows"])
        self._excluded = torch.tensor(settings["excluded"], dtype=torch.long, device="cpu")
        self._classes: str | None = None
        self._members: torch.Tensor | None = None

    def get_supported_tasks(self) -> Set[PoolingTask]:
        """The one task under which scores are asked for."""
        return {TASK}

    def forward(
        self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata
    ) -> list[torch.Tensor | None]:
        """One packed tensor a request (`packing`), on the model's device."""
        cursor = pooling_metadata.get_pooling_cursor()
        starts = [0, *cursor.num_scheduled_tokens_cpu.cumsum(0).tolist()]
        rows, gold, sizes, outside = [], [], [], []
        for start, params in zip(starts, pooling_metadata.pooling_params, strict=False):
            asked: dict[str, Any] = params.extra_kwargs or {
                "positions": [],
                "gold": [],
            }  # vLLM's own warm-up asks for nothing
            self._use_classes(asked.get("classes"))
            rows += [start + position - self._shift for position in asked["positions"]]
            gold += asked["gold"]
            sizes.append(len(asked["positions"]))
            outside.append(bool(asked.get("outside")))
        device = hidden_states.device
        index = torch.tensor(rows, dtype=torch.long).to(device, non_blocking=True)
        answers = torch.tensor(gold, dtype=torch.long).to(device, non_blocking=True)
        if any(outside):
            return [self._outside(hidden_states[i]) for i in index.split(sizes)]
        parts = [
            self._score(
                hidden_states[index[i : i + self._head_rows]], answers[i : i + self._head_rows]
            )
            for i in range(0, len(rows), self._head_rows)
        ]
        packed = torch.cat(parts) if parts else torch.zeros(0, columns(self._spec), device=device)
        return list(packed.split(sizes))

    def _use_classes(self, path: str | None) -> None:
        """The classes of a file, which is read when it is first named."""
        if path is None or path == self._classes:
            return
        class_of = np.load(path, allow_pickle=False)
        self._classes, self._spec = (
            path,
            dataclasses.replace(self._spec, classes=int(class_of.max()) + 1),
        )
        self._members = member_matrix(class_of, self._spec.classes)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        ScorePooler.rows_run += len(hidden)
        logits = self._compute_logits(hidden)
        if logits is not None:
            self._excluded = self._excluded.to(logits.device)
            self._members = None if self._members is None else self._members.to(logits.device)
        return logits

    def _score(self, hidden: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
        logits = self._logits(hidden)
        if (
            logits is None
        ):  # a tensor-parallel rank that holds no gathered logits, and whose answer nobody reads
            return torch.zeros(len(gold), columns(self._spec), device=hidden.device)
        return pack(extract(logits, gold, self._spec, self._excluded, self._members))

    def _outside(self, hidden: torch.Tensor) -> torch.Tensor:
        """Sums over rows of probabilities outside of the top-k, a row a temperature."""
        logits = self._logits(hidden)
        if logits is None or not len(hidden):
            return torch.zeros(len(self._spec.temperatures), 1, device=hidden.device)
        return outside_sums(logits, self._spec, self._excluded)
