"""Key maps: how a checkpoint's own config and tensor names become a stock transformers model (DESIGN §5).

No modelling code: each architecture names the transformers class, translates the config, and says for every tensor
of the checkpoint where it goes. The loader checks that all go somewhere and that nothing stays empty.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

RawConfig = Mapping[str, Any]


@dataclass(frozen=True)
class Placement:
    """Where (part of) a tensor goes: parameter `name`, whole."""

    name: str


@dataclass(frozen=True)
class Architecture:
    """One layout of checkpoints. `rename` are (pattern, replacement) pairs; a key that none matches is left over."""

    model_types: tuple[str, ...]
    model_class: type[PreTrainedModel]
    config: Callable[[RawConfig], PreTrainedConfig]
    rename: tuple[tuple[str, str], ...]

    def place(self, key: str) -> list[Placement]:
        """Where the tensor `key` of a checkpoint goes; empty if this layout does not know it."""
        for pattern, replacement in self.rename:
            if re.fullmatch(pattern, key):
                return [Placement(re.sub(pattern, replacement, key))]
        return []


_SAME = ((r"(model\.(embed_tokens|norm)\..*|model\.layers\.\d+\..*|lm_head\.weight)", r"\1"),)


def _rope(raw: RawConfig, default: float = 10_000.0) -> dict[str, Any]:
    stored = raw.get("rope_parameters")
    return dict(stored) if stored else {"rope_type": "default", "rope_theta": float(raw.get("rope_theta", default))}


def _special(raw: RawConfig) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
    return {name: raw.get(name) for name in names}


def _llama(raw: RawConfig) -> LlamaConfig:
    return LlamaConfig(**{k: v for k, v in raw.items() if k not in ("model_type", "architectures")})


def _llada(raw: RawConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=raw.get("embedding_size") or raw["vocab_size"],
        hidden_size=raw["d_model"],
        intermediate_size=raw.get("mlp_hidden_size") or raw["mlp_ratio"] * raw["d_model"],
        num_hidden_layers=raw["n_layers"],
        num_attention_heads=raw["n_heads"],
        num_key_value_heads=raw.get("n_kv_heads") or raw["n_heads"],
        hidden_act=raw["activation_type"],
        max_position_embeddings=raw["max_sequence_length"],
        rms_norm_eps=raw["rms_norm_eps"],
        rope_parameters=_rope(raw),
        tie_word_embeddings=raw["weight_tying"],
        attention_bias=raw["include_qkv_bias"],
        mlp_bias=raw["include_bias"],
        **_special(raw),
    )


def _qwen3(raw: RawConfig) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=raw["num_attention_heads"],
        num_key_value_heads=raw["num_key_value_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        hidden_act=raw["hidden_act"],
        max_position_embeddings=raw["max_position_embeddings"],
        rms_norm_eps=raw["rms_norm_eps"],
        rope_parameters=_rope(raw),
        tie_word_embeddings=raw["tie_word_embeddings"],
        attention_bias=raw.get("attention_bias", False),
        **_special(raw),
    )


_B = r"model\.transformer\.blocks\.(\d+)\."
_L = r"model.layers.\1."

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(("llama",), LlamaForCausalLM, _llama, _SAME),
    "llada": Architecture(
        ("llada",),
        LlamaForCausalLM,
        _llada,
        (
            (r"model\.transformer\.wte\.weight", "model.embed_tokens.weight"),
            (r"model\.transformer\.ln_f\.weight", "model.norm.weight"),
            (r"model\.transformer\.ff_out\.weight", "lm_head.weight"),
            (_B + r"attn_norm\.(weight)", _L + r"input_layernorm.\2"),
            (_B + r"ff_norm\.(weight)", _L + r"post_attention_layernorm.\2"),
            (_B + r"attn_out\.(weight|bias)", _L + r"self_attn.o_proj.\2"),
            (_B + r"([qkv])_proj\.(weight|bias)", _L + r"self_attn.\2_proj.\3"),
            (_B + r"ff_proj\.(weight|bias)", _L + r"mlp.gate_proj.\2"),
            (_B + r"up_proj\.(weight|bias)", _L + r"mlp.up_proj.\2"),
            (_B + r"ff_out\.(weight|bias)", _L + r"mlp.down_proj.\2"),
        ),
    ),
    "qwen3": Architecture(("qwen3", "a2d-qwen3"), Qwen3ForCausalLM, _qwen3, _SAME),
}
