"""Key maps: how a checkpoint's own config and tensor names become a stock transformers model (DESIGN §5).

No modelling code: each architecture names the transformers class, translates the config, and says for every tensor
of the checkpoint where it goes. The loader checks that all go somewhere and that nothing stays empty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from shared.models.config_keys import Fixed
from shared.models.key_maps import Rename, Rule, SplitRows, StackExperts

RawConfig = Mapping[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One layout of checkpoints: the config's model types, the transformers class, and the rules for its tensors."""

    model_types: tuple[str, ...]
    model_class: type[PreTrainedModel]
    config: Callable[[RawConfig], PreTrainedConfig]
    rules: tuple[Rule, ...]
    fixed: Fixed = field(default_factory=dict)
    """Keys of the config that must be as the transformers class has it."""


_SAME = (Rename(r"(model\.(embed_tokens|norm)\..*|model\.layers\.\d+\..*|lm_head\.weight)", r"\1"),)


def _rope(raw: RawConfig, default: float = 10_000.0) -> dict[str, Any]:
    """Of transformers 5 (`rope_parameters`) or 4 (`rope_theta` and `rope_scaling`)."""
    stored, scaling, theta = (
        raw.get("rope_parameters"),
        raw.get("rope_scaling"),
        raw.get("rope_theta", default),
    )
    if stored:
        return dict(stored)
    scaling = dict(scaling or {})
    kind = scaling.pop("type", "default")
    return {"rope_type": kind, **scaling, "rope_theta": float(theta)}


def _special(raw: RawConfig) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
    return {name: raw.get(name) for name in names}


def _llama(raw: RawConfig) -> LlamaConfig:
    names = {field.name for field in fields(LlamaConfig)} - {"architectures"}
    values = {name: raw[name] for name in raw if name in names}
    return LlamaConfig(**{**values, "rope_parameters": _rope(raw), **_special(raw)})


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


def _qwen(raw: RawConfig) -> dict[str, Any]:
    """What the configs of the Qwen family share."""
    return {
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["hidden_size"],
        "num_hidden_layers": raw["num_hidden_layers"],
        "num_attention_heads": raw["num_attention_heads"],
        "num_key_value_heads": raw["num_key_value_heads"],
        "hidden_act": raw["hidden_act"],
        "max_position_embeddings": raw["max_position_embeddings"],
        "rms_norm_eps": raw["rms_norm_eps"],
        "rope_parameters": _rope(raw),
        "tie_word_embeddings": raw["tie_word_embeddings"],
        **_special(raw),
    }


def _head_dim(raw: RawConfig) -> dict[str, Any]:
    return {"head_dim": raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]}


def _qwen2(raw: RawConfig) -> Qwen2Config:
    return Qwen2Config(
        **_qwen(raw), intermediate_size=raw["intermediate_size"], use_sliding_window=False
    )


def _qwen3(raw: RawConfig) -> Qwen3Config:
    return Qwen3Config(
        **_qwen(raw),
        **_head_dim(raw),
        intermediate_size=raw["intermediate_size"],
        attention_bias=raw.get("attention_bias", False),
    )


def _llada_moe(raw: RawConfig) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **_qwen(raw),
        **_head_dim(raw),
        intermediate_size=raw["dense_intermediate_size"],
        moe_intermediate_size=raw["expert_intermediate_size"],
        attention_bias=raw.get("attention_bias", False),
        num_experts=raw["num_experts"],
        num_experts_per_tok=raw["num_experts_per_tok"],
        norm_topk_prob=bool(raw.get("norm_topk_prob")),
        mlp_only_layers=[i for i, sparse in enumerate(raw["moe_layer_freq"]) if not sparse],
        decoder_sparse_step=1,
    )


def _llada2_moe(raw: RawConfig) -> Glm4MoeConfig:
    rope = {**_rope(raw), "partial_rotary_factor": raw.get("partial_rotary_factor", 1.0)}
    return Glm4MoeConfig(
        **{**_qwen(raw), **_head_dim(raw), "rope_parameters": rope},
        intermediate_size=raw["intermediate_size"],
        moe_intermediate_size=raw["moe_intermediate_size"],
        attention_bias=raw.get("use_qkv_bias", False),
        use_qk_norm=raw.get("use_qk_norm", True),
        n_routed_experts=raw["num_experts"],
        n_shared_experts=raw["num_shared_experts"],
        num_experts_per_tok=raw["num_experts_per_tok"],
        n_group=raw["n_group"],
        topk_group=raw["topk_group"],
        first_k_dense_replace=raw["first_k_dense_replace"],
        routed_scaling_factor=raw["routed_scaling_factor"],
        norm_topk_prob=raw.get("norm_topk_prob", True),
    )


def _fused_qkv_rows(config: PreTrainedConfig) -> tuple[int, ...]:
    head: int = config.head_dim
    return (config.num_attention_heads * head, *[config.num_key_value_heads * head] * 2)


def _experts(prefix: str) -> tuple[Rule, ...]:
    """The experts' three matrices: gate and up share one slab, down has its own."""
    source, target = prefix + r"mlp\.experts\.(?P<expert>\d+)\.", r"model.layers.\1.mlp.experts."
    return (
        StackExperts(source + r"gate_proj\.weight", target + "gate_up_proj", part=0, parts=2),
        StackExperts(source + r"up_proj\.weight", target + "gate_up_proj", part=1, parts=2),
        StackExperts(source + r"down_proj\.weight", target + "down_proj"),
    )


_B = r"model\.transformer\.blocks\.(\d+)\."
_K = r"model\.layers\.(\d+)\."
_L = r"model.layers.\1."

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(("llama",), LlamaForCausalLM, _llama, _SAME),
    "llada": Architecture(
        ("llada",),
        LlamaForCausalLM,
        _llada,
        (
            Rename(r"model\.transformer\.wte\.weight", "model.embed_tokens.weight"),
            Rename(r"model\.transformer\.ln_f\.weight", "model.norm.weight"),
            Rename(r"model\.transformer\.ff_out\.weight", "lm_head.weight"),
            Rename(_B + r"attn_norm\.(weight)", _L + r"input_layernorm.\2"),
            Rename(_B + r"ff_norm\.(weight)", _L + r"post_attention_layernorm.\2"),
            Rename(_B + r"attn_out\.(weight|bias)", _L + r"self_attn.o_proj.\2"),
            Rename(_B + r"([qkv])_proj\.(weight|bias)", _L + r"self_attn.\2_proj.\3"),
            Rename(_B + r"ff_proj\.(weight|bias)", _L + r"mlp.gate_proj.\2"),
            Rename(_B + r"up_proj\.(weight|bias)", _L + r"mlp.up_proj.\2"),
            Rename(_B + r"ff_out\.(weight|bias)", _L + r"mlp.down_proj.\2"),
        ),
        {
            "block_type": ("llama",), "block_group_size": (1,), "layer_norm_type": ("rms",), "rope": (True,),
            "layer_norm_with_affine": (True,), "rope_full_precision": (True,), "tie_word_embeddings": (True, False),
            "mlp_ratio": (), "vocab_size": (),
        },
    ),
    "dream": Architecture(("Dream",), Qwen2ForCausalLM, _qwen2, _SAME, {"head_dim": (), "attention_bias": ()}),
    "qwen3": Architecture(
        ("qwen3", "a2d-qwen3", "wedlm", "sdar"), Qwen3ForCausalLM, _qwen3, _SAME, {"qk_norm": (True,)}
    ),
    "llada_moe": Architecture(
        ("lladamoe", "llada_moe", "llada"),  # the published ones say llada
        Qwen3MoeForCausalLM,
        _llada_moe,
        (*_experts(_K), *_SAME),
        {
            "qk_layernorm": (True,), "partial_rotary_factor": (1,), "routed_scaling_factor": (1,),
            "moe_router_score_function": ("softmax",), "router_num_group": (-2, -1, 0, 1),
            "router_topk_group": (-2, -1, 0, 1),
        },
    ),
    "llada2_moe": Architecture(
        ("llada2_moe",),
        Glm4MoeForCausalLM,
        _llada2_moe,
        (
            Rename(r"model\.word_embeddings\.weight", "model.embed_tokens.weight"),
            SplitRows(
                _K + r"attention\.query_key_value\.(weight|bias)",
                tuple(_L + rf"self_attn.{x}_proj.\2" for x in "qkv"),
                _fused_qkv_rows,
            ),
            Rename(_K + r"attention\.dense\.(weight|bias)", _L + r"self_attn.o_proj.\2"),
            Rename(_K + r"attention\.query_layernorm\.weight", _L + "self_attn.q_norm.weight"),
            Rename(_K + r"attention\.key_layernorm\.weight", _L + "self_attn.k_norm.weight"),
            Rename(_K + r"mlp\.gate\.expert_bias", _L + "mlp.gate.e_score_correction_bias"),
            *_experts(_K),
            *_SAME,
        ),
        {
            "score_function": ("sigmoid",), "router_dtype": ("fp32", "float32"), "use_rmsnorm": (True,),
            "moe_router_enable_expert_bias": (True,), "rotary_dim": (),
        },
    ),
}  # fmt: skip
