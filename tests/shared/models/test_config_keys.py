"""No key of a config is passed over in silence: obeyed, harmless, or refused by name. Published
configs are taken.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model, meta_model
from shared.system.errors import TideError

ARCHITECTURE_OF = {
    "a2d_qwen3": "qwen3",
    "llada": "llada",
    "dream": "dream",
    "wedlm": "qwen3",
    "llada_moe": "llada_moe",
    "llada2_moe": "llada2_moe",
    "step/teacher_cross": "llama",
}

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    # GSAI-ML/LLaDA-8B-Instruct, by the config that repositories of LLaDA reprint; layers cut
    "llada-8b": (
        "llada",
        {
            "activation_type": "silu",
            "alibi": False,
            "alibi_bias_max": 8.0,
            "architectures": ["LLaDAModelLM"],
            "attention_dropout": 0.0,
            "attention_layer_norm": False,
            "attention_layer_norm_with_affine": True,
            "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig"},
            "bias_for_layer_norm": False,
            "block_group_size": 1,
            "block_type": "llama",
            "d_model": 4096,
            "embedding_dropout": 0.0,
            "embedding_size": 126464,
            "eos_token_id": 126081,
            "flash_attention": False,
            "include_bias": False,
            "include_qkv_bias": False,
            "init_cutoff_factor": None,
            "init_device": "meta",
            "init_fn": "mitchell",
            "init_std": 0.02,
            "input_emb_norm": False,
            "layer_norm_type": "rms",
            "layer_norm_with_affine": True,
            "mask_token_id": 126336,
            "max_sequence_length": 4096,
            "mlp_hidden_size": 12288,
            "mlp_ratio": 4,
            "model_type": "llada",
            "multi_query_attention": None,
            "n_heads": 32,
            "n_kv_heads": 32,
            "n_layers": 1,
            "pad_token_id": 126081,
            "precision": "amp_bf16",
            "residual_dropout": 0.0,
            "rms_norm_eps": 1e-05,
            "rope": True,
            "rope_full_precision": True,
            "rope_theta": 500000.0,
            "scale_logits": False,
            "transformers_version": "4.46.3",
            "use_cache": False,
            "vocab_size": 126464,
            "weight_tying": False,
        },
    ),
    # inclusionAI/LLaDA2.0-mini, by the config in serving engines' own tests, which leaves out
    # use_qkv_bias
    "llada2-mini": (
        "llada2_moe",
        {
            "dtype": "bfloat16",
            "first_k_dense_replace": 1,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 5120,
            "max_position_embeddings": 32768,
            "model_type": "llada2_moe",
            "moe_intermediate_size": 512,
            "n_group": 8,
            "norm_head": False,
            "norm_topk_prob": True,
            "num_attention_heads": 16,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 1,
            "num_key_value_heads": 4,
            "num_shared_experts": 1,
            "output_router_logits": False,
            "pad_token_id": 156892,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-06,
            "rope_theta": 600000,
            "routed_scaling_factor": 2.5,
            "score_function": "sigmoid",
            "tie_word_embeddings": False,
            "topk_group": 4,
            "vocab_size": 157184,
            "rotary_dim": 64,
            "router_dtype": "fp32",
            "moe_router_enable_expert_bias": True,
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_taken(name: str) -> None:
    meta_model(*PUBLISHED[name])


def changed(golden: Path, name: str, **changes: Any) -> Any:
    """The model without weights of a golden checkpoint's config with changes."""
    config = json.loads((golden / name / "config.json").read_text())
    return meta_model(ARCHITECTURE_OF[name], {**config, **changes})


@pytest.mark.parametrize("name", ARCHITECTURE_OF)
def test_a_key_that_nothing_reads_is_refused_and_one_that_is_off_is_not(
    golden: Path, name: str
) -> None:
    changed(golden, name, logits_scaling=None, embedding_multiplier=0, attn_logit_softcap=False)
    # a library's own notes and dropouts change nothing
    changed(golden, name, _name_or_path="y", attn_pdrop=0.1, is_llama_config=True)
    for value in (8.0, True, [1], "on"):
        with pytest.raises(TideError) as error:
            changed(golden, name, logits_scaling=value)
        assert "logits_scaling" in str(error.value)


REFUSED: list[tuple[str, str, Any]] = [
    ("llada", "block_type", "sequential"),
    ("llada", "rope", False),
    ("llada", "alibi", True),
    ("llada", "multi_query_attention", True),
    ("llada_moe", "clip_qkv", 8.0),
    ("llada_moe", "partial_rotary_factor", 0.5),
    ("llada_moe", "moe_router_score_function", "sigmoid"),
    ("llada2_moe", "score_function", "softmax"),
    ("llada2_moe", "norm_head", True),
    ("dream", "use_sliding_window", True),
    ("a2d_qwen3", "layer_types", ["full_attention", "sliding_attention"]),
    ("wedlm", "qk_norm", False),
    ("a2d_qwen3", "quantization_config", {"bits": 4}),
]


def test_what_is_not_built_is_refused_by_name(golden: Path) -> None:
    for name, key, value in REFUSED:
        with pytest.raises(TideError) as error:
            changed(golden, name, **{key: value})
        assert key in str(error.value) and error.value.fix is not None


def test_the_published_moe_calls_itself_llada(golden: Path, tmp_path: Path) -> None:
    """Its config.json says so; repositories that load it tell their users to edit the file."""
    folder = Path(shutil.copytree(golden / "llada_moe", tmp_path / "m", copy_function=shutil.copy))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llada"}))
    one, two = (
        load_model(open_checkpoint(str(place)), "llada_moe", torch.float32)
        for place in (folder, golden / "llada_moe")
    )
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(one(ids).logits, two(ids).logits)


def test_every_key_of_a_llama_is_obeyed(golden: Path) -> None:
    """Of transformers' own fields none is lost: with this one the model has biases."""
    model = changed(golden, "step/teacher_cross", mlp_bias=True)
    assert any(name.endswith("up_proj.bias") for name, _ in model.named_parameters())
