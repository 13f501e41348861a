"""The scorers: vLLM's stock classes under bidirectional attention, with a pooler for scores.

Imported inside vLLM's processes only. What a scorer must know travels in its config under `tide`
(see `vllm_engine`). Top to bottom: weights → model → pooler (hidden states at the requested rows →
LM head → what is kept of the logits).
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Set
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.encoder_only_attention import EncoderOnlyAttention
from vllm.model_executor.layers.pooler import DispatchPooler, Pooler
from vllm.model_executor.models import glm4_moe, llama, qwen2, qwen3, qwen3_moe
from vllm.model_executor.models.interfaces_base import attn_type
from vllm.tasks import PoolingTask
from vllm.v1.pool.metadata import PoolingMetadata

from shared.cache.shards import load_tables
from shared.models.architectures import ARCHITECTURES, FUSED_QKV, SPLIT_QKV, split_qkv
from teacher_cache.engines.vllm_engine import columns_of
from teacher_cache.method import TailEncoder, TargetSpec, extract

TASK: PoolingTask = "token_classify"


class _Scorer:
    """Pooler and renamed weights, put before a stock class in the bases."""

    is_pooling_model = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        settings: dict[str, Any] = vllm_config.model_config.hf_config.tide
        self._tide = settings
        self.pooler = DispatchPooler({TASK: ScorePooler(self.compute_logits, settings)})  # type: ignore[attr-defined]
        if not settings["swap_attention"]:
            return
        # Encoder-only attention in place of causal, for stock classes that ignore `is_causal`.
        by_name = vllm_config.compilation_config.static_forward_context
        for layer in self.model.layers:  # type: ignore[attr-defined]
            attention = layer.self_attn
            name = attention.attn.layer_name
            del by_name[name]
            attention.attn = EncoderOnlyAttention(
                attention.num_heads,
                attention.head_dim,
                attention.scaling,
                num_kv_heads=attention.num_kv_heads,
                cache_config=vllm_config.cache_config,
                quant_config=vllm_config.quant_config,
                prefix=name,
            )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(self._stock_weights(weights))  # type: ignore[misc]

    def _stock_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The hub's own tensors under the names of the stock architecture, for vLLM's loaders.

        vLLM stacks experts itself, so an expert's matrix keeps its own name. Keys are known, as
        `loading.load_model` has seen to.
        """
        kind, config = ARCHITECTURES[self._tide["architecture"]], self.config  # type: ignore[attr-defined]
        for key, tensor in weights:
            name = kind.stock_name(key)
            if FUSED_QKV in name:
                for part, rows in zip(SPLIT_QKV, split_qkv(tensor, config), strict=True):
                    yield name.replace(FUSED_QKV, part), rows
            elif not (config.tie_word_embeddings and name == "lm_head.weight"):
                yield name, tensor


@attn_type("encoder_only")
class TideLlamaScorer(_Scorer, llama.LlamaForCausalLM):
    """LLaDA-8B, LLaDA-1.5."""


@attn_type("encoder_only")
class TideQwen2Scorer(_Scorer, qwen2.Qwen2ForCausalLM):
    """Dream."""


@attn_type("encoder_only")
class TideQwen3Scorer(_Scorer, qwen3.Qwen3ForCausalLM):
    """Any Qwen3 under full attention."""


@attn_type("encoder_only")
class TideQwen3MoeScorer(_Scorer, qwen3_moe.Qwen3MoeForCausalLM):
    """LLaDA-MoE."""


@attn_type("encoder_only")
class TideGlm4MoeScorer(_Scorer, glm4_moe.Glm4MoeForCausalLM):
    """LLaDA2.x."""


class ScorePooler(Pooler):
    """Runs the LM head at the rows that requests name in `extra_kwargs`, and at no other.

    `positions` are rows of the request's own sequence, `gold` the token ids there, `tables` (where
    named) a folder that holds them. A request with `hidden` gets the hidden states there instead.
    """

    # Rows for which the LM head ran in this process, for the benchmark and the tests.
    rows_run: ClassVar[int] = 0

    def __init__(
        self, compute_logits: Callable[[Tensor], Tensor | None], settings: dict[str, Any]
    ) -> None:
        super().__init__()
        # A bound method: the model does not become a child of its pooler.
        self._compute_logits = compute_logits
        self._spec = TargetSpec(settings["k"], settings["mass"], tuple(settings["temperatures"]))
        self._shift = int(settings["shift"])
        self._head_rows = int(settings["head_rows"])
        self._excluded = torch.tensor(settings["excluded"], dtype=torch.long, device="cpu")
        self._encoder: TailEncoder | None = None

    def get_supported_tasks(self) -> Set[PoolingTask]:
        return {TASK}

    def forward(
        self, hidden_states: Tensor, pooling_metadata: PoolingMetadata
    ) -> list[Tensor | None]:
        """One packed tensor a request (`vllm_engine.unpack`), on the model's device."""
        # 1. The rows that the requests of this step ask for, in the step's hidden states.
        cursor = pooling_metadata.get_pooling_cursor()
        starts = [0, *cursor.num_scheduled_tokens_cpu.cumsum(0).tolist()]
        rows, gold, sizes, hidden = [], [], [], False
        for start, params in zip(starts, pooling_metadata.pooling_params, strict=False):
            # vLLM's own warm-up asks for nothing.
            asked: dict[str, Any] = params.extra_kwargs or {"positions": [], "gold": []}
            self._use_tables(asked.get("tables"))
            rows += [start + position - self._shift for position in asked["positions"]]
            gold += asked["gold"]
            sizes.append(len(asked["positions"]))
            hidden |= bool(asked.get("hidden"))
        device = hidden_states.device
        index = torch.tensor(rows, dtype=torch.long).to(device, non_blocking=True)
        answers = torch.tensor(gold, dtype=torch.long).to(device, non_blocking=True)

        # 2. The head, over the rows of all requests together, some at a time.
        if hidden:
            return list(hidden_states[index].float().split(sizes))
        parts = []
        for i in range(0, len(rows), self._head_rows):
            some = slice(i, i + self._head_rows)
            parts.append(self._score(hidden_states[index[some]], answers[some]))
        nothing = torch.zeros(0, sum(columns_of(self._spec)), device=device)
        return list(torch.cat(parts or [nothing]).split(sizes))

    def _use_tables(self, folder: str | None) -> None:
        """The tables in a folder, which are read when they are first named."""
        if folder is not None and self._encoder is None:
            tables = load_tables(Path(folder))
            self._spec = dataclasses.replace(self._spec, rank=tables.rank)
            self._encoder = TailEncoder(tables, self._spec.temperatures)

    def _score(self, hidden: Tensor, gold: Tensor) -> Tensor:
        """What `extract` keeps, field beside field: [rows, columns]."""
        ScorePooler.rows_run += len(hidden)
        logits = self._compute_logits(hidden)
        if logits is None:  # a tensor-parallel rank without them: nobody reads its answer
            return torch.zeros(len(gold), sum(columns_of(self._spec)), device=hidden.device)
        self._excluded = self._excluded.to(logits.device)
        fields = extract(logits, hidden, gold, self._spec, self._excluded, self._encoder)
        return torch.cat([cell.float().reshape(len(gold), -1) for cell in fields.values()], dim=1)
