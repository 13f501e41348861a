"""The pooler of every scorer: hidden states at the requested rows → LM head → top-k, logsumexp, gold logit."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.pooler import Pooler
from vllm.tasks import PoolingTask
from vllm.v1.pool.metadata import PoolingMetadata

from teacher_cache.engines.vllm_engine.packing import columns, pack
from teacher_cache.targets import TargetSpec, extract

TASK: PoolingTask = "token_classify"


class ScorePooler(Pooler):
    """Runs the LM head at the rows that requests name in `extra_kwargs`, and at no other.

    `positions` are rows of the request's own sequence, `gold` the token ids there. Requests of one step share the
    head's passes, `head_rows` rows at a time.
    """

    rows_run: ClassVar[int] = 0
    """Rows for which the LM head ran in this process, for the benchmark and the tests."""

    def __init__(self, compute_logits: Callable[[torch.Tensor], torch.Tensor | None], settings: dict[str, Any]) -> None:
        super().__init__()
        self._compute_logits = compute_logits  # a bound method: the model does not become a child of its pooler
        self._spec = TargetSpec(settings["k"], settings["mass"], tuple(settings["temperatures"]))
        self._shift = int(settings["shift"])
        self._head_rows = int(settings["head_rows"])
        self._excluded = torch.tensor(settings["excluded"], dtype=torch.long, device="cpu")

    def get_supported_tasks(self) -> Set[PoolingTask]:
        """The one task under which scores are asked for."""
        return {TASK}

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata) -> list[torch.Tensor | None]:
        """One packed tensor a request (`packing`), on the model's device."""
        cursor = pooling_metadata.get_pooling_cursor()
        starts = [0, *cursor.num_scheduled_tokens_cpu.cumsum(0).tolist()]
        rows, gold, sizes = [], [], []
        for start, params in zip(starts, pooling_metadata.pooling_params, strict=False):
            asked = params.extra_kwargs or {"positions": [], "gold": []}  # vLLM's own warm-up asks for nothing
            rows += [start + position - self._shift for position in asked["positions"]]
            gold += asked["gold"]
            sizes.append(len(asked["positions"]))
        device = hidden_states.device
        index = torch.tensor(rows, dtype=torch.long).to(device, non_blocking=True)
        answers = torch.tensor(gold, dtype=torch.long).to(device, non_blocking=True)
        parts = [
            self._score(hidden_states[index[i : i + self._head_rows]], answers[i : i + self._head_rows])
            for i in range(0, len(rows), self._head_rows)
        ]
        packed = torch.cat(parts) if parts else torch.zeros(0, columns(self._spec), device=device)
        return list(packed.split(sizes))

    def _score(self, hidden: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
        ScorePooler.rows_run += len(hidden)
        logits = self._compute_logits(hidden)
        if logits is None:  # a tensor-parallel rank that holds no gathered logits, and whose answer nobody reads
            return torch.zeros(len(gold), columns(self._spec), device=hidden.device)
        self._excluded = self._excluded.to(logits.device)
        return pack(extract(logits, gold, self._spec, self._excluded))
