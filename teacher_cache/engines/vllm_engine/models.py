"""The scorers: vLLM's stock classes under bidirectional attention, with a pooler that returns scores.

Imported inside vLLM's processes only. What a scorer must know travels in its config under `tide` (see `engine`).
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.encoder_only_attention import EncoderOnlyAttention
from vllm.model_executor.layers.pooler import DispatchPooler
from vllm.model_executor.models.glm4_moe import Glm4MoeForCausalLM
from vllm.model_executor.models.interfaces_base import attn_type
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from teacher_cache.engines.vllm_engine.pooler import TASK, ScorePooler
from teacher_cache.engines.vllm_engine.weights import stock_weights


class _Scorer:
    """Pooler and key map, put before a stock class in the bases."""

    is_pooling_model = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        settings: dict[str, Any] = vllm_config.model_config.hf_config.tide
        self._tide = settings
        if settings["swap_attention"]:
            _see_both_ways(self, vllm_config)
        self.pooler = DispatchPooler({TASK: ScorePooler(self.compute_logits, settings)})  # type: ignore[attr-defined]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the hub's own layout."""
        return super().load_weights(stock_weights(weights, self._tide["architecture"], self.config))  # type: ignore[misc, attr-defined]


def _see_both_ways(model: Any, vllm_config: VllmConfig) -> None:
    """Replace causal attention by encoder-only attention, for stock classes that do not honour `is_causal`."""
    layers = vllm_config.compilation_config.static_forward_context
    for layer in model.model.layers:
        attention = layer.self_attn
        name = attention.attn.layer_name
        del layers[name]
        attention.attn = EncoderOnlyAttention(
            attention.num_heads,
            attention.head_dim,
            attention.scaling,
            num_kv_heads=attention.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=name,
        )


@attn_type("encoder_only")
class TideLlamaScorer(_Scorer, LlamaForCausalLM):
    """LLaDA-8B, LLaDA-1.5."""


@attn_type("encoder_only")
class TideQwen2Scorer(_Scorer, Qwen2ForCausalLM):
    """Dream."""


@attn_type("encoder_only")
class TideQwen3Scorer(_Scorer, Qwen3ForCausalLM):
    """Any Qwen3 under full attention."""


@attn_type("encoder_only")
class TideQwen3MoeScorer(_Scorer, Qwen3MoeForCausalLM):
    """LLaDA-MoE."""


@attn_type("encoder_only")
class TideGlm4MoeScorer(_Scorer, Glm4MoeForCausalLM):
    """LLaDA2.x."""
