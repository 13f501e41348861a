"""How checkpoints of the hub become stock transformers models.

No modelling code: an architecture names the transformers class, translates the config, and says
which of the checkpoint's tensors are called differently there. transformers' own loader renames,
splits and stacks them.

A key of a config that no translation reads could change what the model computes, in silence. So a
key is obeyed, has the value for which the class is written (`fixed`, `FIXED`), has no influence on
logits (`HARMLESS`), or is refused by name (`loading.meta_model`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
import transformers
from transformers import core_model_loading as core
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

RawConfig = Mapping[str, Any]
FUSED_QKV = "attention.query_key_value"
SPLIT_QKV = tuple(f"self_attn.{x}_proj" for x in "qkv")

# The values that a key may have; none: any, since the key follows from others.
Fixed = Mapping[str, tuple[Any, ...]]
FIXED: Fixed = {"use_sliding_window": (False,), "is_encoder_decoder": (False,),
                "is_decoder": (False, True)}  # fmt: skip

HARMLESS = frozenset({
    # what it is, and who wrote it
    "architectures", "auto_map", "model_type", "dtype", "torch_dtype", "transformers_version",
    "tokenizer_class", "attn_implementation", "unsloth_version", "is_llama_config",
    "transformers.js_config", "model_max_length", "unsloth_fixed", "save_dtype", "language", "name",
    "license", "task_specific_params", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "prefix", "attribute_map", "served_as", "rope_base",
    # special ids, which are read elsewhere
    "bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "sep_token_id",
    "decoder_start_token_id",
    # how text is generated: never by these keys here
    "max_length", "min_length", "num_beams", "temperature", "top_k", "top_p", "typical_p",
    "repetition_penalty", "length_penalty", "num_return_sequences", "num_beam_groups", "do_sample",
    "block_size", "mask_id", "wedlm_window_size", "wedlm_entropy_threshold",
    "wedlm_pos_penalty_factor", "generation_config",
    # how it is trained and run
    "use_cache", "return_dict", "return_dict_in_generate", "initializer_range", "init_device",
    "init_fn", "init_std", "init_cutoff_factor", "precision", "flash_attention", "use_flash_attn",
    "use_flash_attention", "router_aux_loss_coef", "output_router_logits", "pretraining_tp",
    "fuse_cross_entropy", "ep_size", "micro_forward", "skip_checkpoint", "use_deepep", "debug",
    "chunk_size_feed_forward",
    # of what is off: ALiBi, windows, the norm that attention_layer_norm would add
    "alibi_bias_max", "max_window_layers", "sliding_window", "attention_layer_norm_with_affine",
})  # fmt: skip


class FusedGlm4Moe(transformers.Glm4MoeForCausalLM):
    """GLM-4's MoE from checkpoints that keep query, key and value in one tensor.

    A class of its own, so that transformers splits them under this name alone.
    """

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for its decorator in the file of the class, and would run expert by
        # expert here; the layers are the stock ones, which multiply all experts at once.
        return True


def split_qkv(fused: torch.Tensor, config: Any) -> tuple[torch.Tensor, ...]:
    """The rows of the query, key and value projections, which lie one after the other."""
    kv = config.num_key_value_heads * config.head_dim
    return fused.split((config.num_attention_heads * config.head_dim, kv, kv))


class _SplitQKV(core.ConversionOps):
    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **more: Any
    ) -> dict[str, Any]:
        ((fused,),) = input_dict.values()
        parts = [part.contiguous() for part in split_qkv(fused, more["config"])]
        return dict(zip(target_patterns, parts, strict=True))

    @property
    def reverse_op(self) -> core.ConversionOps:
        return core.Concatenate(0)


# Experts need no entry: the stock classes stack them themselves.
_SPLIT = core.WeightConverter(FUSED_QKV, list(SPLIT_QKV), [_SplitQKV()])
register_checkpoint_conversion_mapping("FusedGlm4Moe", [_SPLIT], overwrite=True)


@dataclass(frozen=True)
class Architecture:
    """One layout of checkpoints.

    `model_types`: what a config of it calls itself. `config`: its translation. `renames`: regular
    expressions of the checkpoint's tensor names, and what stands there in the model's. `fixed`:
    keys of the config that must be as the transformers class has it.
    """

    model_types: tuple[str, ...]
    model_class: type[transformers.PreTrainedModel]
    config: Callable[[RawConfig], transformers.PreTrainedConfig]
    renames: Mapping[str, str] = field(default_factory=dict)
    fixed: Fixed = field(default_factory=dict)

    @property
    def stock_class(self) -> str:
        fused = self.model_class is FusedGlm4Moe
        return "Glm4MoeForCausalLM" if fused else self.model_class.__name__

    def stock_name(self, key: str) -> str:
        """A tensor's name after `renames`; nothing is split or stacked."""
        renamings = [core.WeightRenaming(old, new) for old, new in self.renames.items()]
        return core.rename_source_key(key, renamings, [])[0]


def _common(raw: RawConfig) -> dict[str, Any]:
    """Special ids, and rope as transformers 5 has it, also of configs that transformers 4 wrote."""
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
    scaling = dict(raw.get("rope_scaling") or {})
    theta = float(raw.get("rope_theta", 10_000.0))
    old = {"rope_type": scaling.pop("type", "default"), **scaling, "rope_theta": theta}
    rope = dict(raw.get("rope_parameters") or old)
    return {**{name: raw.get(name) for name in special}, "rope_parameters": rope}


def _own_names(config_class: Any, raw: RawConfig) -> transformers.PreTrainedConfig:
    """The config of an architecture that transformers knows, in its own names."""
    names = {field.name for field in fields(config_class)} - {"architectures"}
    values = {name: raw[name] for name in raw if name in names}
    return config_class(**{**values, **_common(raw)})


def _llada(raw: RawConfig) -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(
        vocab_size=raw.get("embedding_size") or raw["vocab_size"],
        hidden_size=raw["d_model"],
        intermediate_size=raw.get("mlp_hidden_size") or raw["mlp_ratio"] * raw["d_model"],
        num_hidden_layers=raw["n_layers"],
        num_attention_heads=raw["n_heads"],
        num_key_value_heads=raw.get("n_kv_heads") or raw["n_heads"],
        hidden_act=raw["activation_type"],
        max_position_embeddings=raw["max_sequence_length"],
        rms_norm_eps=raw["rms_norm_eps"],
        tie_word_embeddings=raw["weight_tying"],
        attention_bias=raw["include_qkv_bias"],
        mlp_bias=raw["include_bias"],
        **_common(raw),
    )


def _qwen(raw: RawConfig, *more: str) -> dict[str, Any]:
    """What the configs of the Qwen family name alike, and the keys in `more`."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps",
             "tie_word_embeddings", *more)  # fmt: skip
    return {**{name: raw[name] for name in names}, **_common(raw)}


def _head_dim(raw: RawConfig) -> dict[str, Any]:
    return {"head_dim": raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]}


def _qwen2(raw: RawConfig) -> transformers.PreTrainedConfig:
    values = _qwen(raw, "intermediate_size")
    return transformers.Qwen2Config(**values, use_sliding_window=False)


def _qwen3(raw: RawConfig) -> transformers.PreTrainedConfig:
    return transformers.Qwen3Config(
        **_qwen(raw, "intermediate_size"),
        **_head_dim(raw),
        attention_bias=raw.get("attention_bias", False),
    )


def _qwen3_moe(raw: RawConfig) -> transformers.PreTrainedConfig:
    values = _qwen(
        raw, "intermediate_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok",
        "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers",
    )  # fmt: skip
    bias = raw.get("attention_bias", False)
    return transformers.Qwen3MoeConfig(**values, **_head_dim(raw), attention_bias=bias)


def _llada_moe(raw: RawConfig) -> transformers.PreTrainedConfig:
    return transformers.Qwen3MoeConfig(
        **_qwen(raw, "num_experts", "num_experts_per_tok"),
        **_head_dim(raw),
        intermediate_size=raw["dense_intermediate_size"],
        moe_intermediate_size=raw["expert_intermediate_size"],
        attention_bias=raw.get("attention_bias", False),
        norm_topk_prob=bool(raw.get("norm_topk_prob")),
        mlp_only_layers=[i for i, sparse in enumerate(raw["moe_layer_freq"]) if not sparse],
        decoder_sparse_step=1,
    )


def _llada2_moe(raw: RawConfig) -> transformers.PreTrainedConfig:
    values = _qwen(
        raw, "intermediate_size", "moe_intermediate_size", "num_experts_per_tok", "n_group",
        "topk_group", "first_k_dense_replace", "routed_scaling_factor",
    )  # fmt: skip
    values["rope_parameters"]["partial_rotary_factor"] = raw.get("partial_rotary_factor", 1.0)
    return transformers.Glm4MoeConfig(
        **values,
        **_head_dim(raw),
        attention_bias=raw.get("use_qkv_bias", False),
        use_qk_norm=raw.get("use_qk_norm", True),
        n_routed_experts=raw["num_experts"],
        n_shared_experts=raw["num_shared_experts"],
        norm_topk_prob=raw.get("norm_topk_prob", True),
    )


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        ("llama",), transformers.LlamaForCausalLM, partial(_own_names, transformers.LlamaConfig)
    ),
    "smollm3": Architecture(
        ("smollm3",), transformers.SmolLM3ForCausalLM,
        partial(_own_names, transformers.SmolLM3Config),
    ),
    "llada": Architecture(
        ("llada",),
        transformers.LlamaForCausalLM,
        _llada,
        {
            r"^model\.transformer\.wte\.": "model.embed_tokens.",
            r"^model\.transformer\.ln_f\.": "model.norm.",
            r"^model\.transformer\.ff_out\.": "lm_head.",
            r"^model\.transformer\.blocks\.": "model.layers.",
            r"\.attn_norm\.": ".input_layernorm.",
            r"\.ff_norm\.": ".post_attention_layernorm.",
            r"\.attn_out\.": ".self_attn.o_proj.",
            r"\.([qkv]_proj)\.": r".self_attn.\1.",
            r"\.ff_proj\.": ".mlp.gate_proj.",
            r"\.up_proj\.": ".mlp.up_proj.",
            r"\.ff_out\.": ".mlp.down_proj.",
        },
        {
            "block_type": ("llama",), "block_group_size": (1,), "layer_norm_type": ("rms",),
            "rope": (True,), "layer_norm_with_affine": (True,), "rope_full_precision": (True,),
            "tie_word_embeddings": (True, False), "mlp_ratio": (), "vocab_size": (),
        },
    ),
    "dream": Architecture(
        ("Dream",),
        transformers.Qwen2ForCausalLM, _qwen2, {}, {"head_dim": (), "attention_bias": ()},
    ),
    "qwen2": Architecture(
        ("qwen2", "a2d-qwen2", "Fast_dLLM_Qwen"),
        transformers.Qwen2ForCausalLM, _qwen2, {},
        {"head_dim": (), "attention_bias": (), "bd_size": ()},
    ),
    "qwen3": Architecture(
        ("qwen3", "a2d-qwen3", "wedlm", "sdar"),
        transformers.Qwen3ForCausalLM, _qwen3, {}, {"qk_norm": (True,)},
    ),
    "qwen3_moe": Architecture(
        ("qwen3_moe", "sdar_moe", "rnd1"),
        transformers.Qwen3MoeForCausalLM, _qwen3_moe, {},
        {"moe_backend": (), "num_diffusion_steps": ()},
    ),
    "llada_moe": Architecture(
        ("lladamoe", "llada_moe", "llada"),  # the published ones say llada
        transformers.Qwen3MoeForCausalLM,
        _llada_moe,
        {},
        {
            "qk_layernorm": (True,), "partial_rotary_factor": (1,), "routed_scaling_factor": (1,),
            "moe_router_score_function": ("softmax",), "router_num_group": (-2, -1, 0, 1),
            "router_topk_group": (-2, -1, 0, 1),
        },
    ),
    "llada2_moe": Architecture(
        ("llada2_moe",),
        FusedGlm4Moe,
        _llada2_moe,
        {
            r"^model\.word_embeddings\.": "model.embed_tokens.",
            r"\.attention\.dense\.": ".self_attn.o_proj.",
            r"\.attention\.query_layernorm\.": ".self_attn.q_norm.",
            r"\.attention\.key_layernorm\.": ".self_attn.k_norm.",
            r"\.mlp\.gate\.expert_bias": ".mlp.gate.e_score_correction_bias",
        },
        {
            "score_function": ("sigmoid",), "router_dtype": ("fp32", "float32"),
            "use_rmsnorm": (True,), "moe_router_enable_expert_bias": (True,), "rotary_dim": (),
        },
    ),
}  # fmt: skip
