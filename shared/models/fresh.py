"""A new model: a shape, a tokenizer, random weights."""

from __future__ import annotations

from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from shared.settings.config import ModelShape
from shared.text.tokenizers import Tokenizer


def new_model(
    shape: ModelShape, tokenizer: Tokenizer, mask_id: int, positions: int
) -> PreTrainedModel:
    """A model of `shape` for `tokenizer`, embedding and head tied; seed torch first."""
    kinds: dict[str, Any] = {
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "llama": (LlamaConfig, LlamaForCausalLM),
    }
    config_class, model_class = kinds[shape.architecture]
    config = config_class(
        vocab_size=max(len(tokenizer), mask_id + 1),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden_size // shape.heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.special_id("eos"),
        pad_token_id=tokenizer.special_id("pad"),
        mask_token_id=mask_id,
        attn_implementation="sdpa",
    )
    return model_class(config)
