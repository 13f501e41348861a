"""Checkpoints as they are published, with random weights: each gives the logits of a plain forward.

The configs are those of `published.json` with small sizes; which tensors there are, and under which
names, is written down here a second time.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear, silu

from shared.models.checkpoint import open_checkpoint
from shared.models.loading import head_rows, load_model

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
NAMES = [
    "sdar-1.7b", "sdar-30b", "rnd1", "fast-dllm-1.5b", "stable-diffcoder-8b", "a2d-qwen2",
    "smollm2-135m", "smollm3-3b",
]  # fmt: skip
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64,
         "num_key_value_heads": 2}  # fmt: skip
FEWER = {"head_dim": 16, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}


def small_config(name: str) -> dict[str, Any]:
    """The published config, smaller; two layers where it has one here."""
    raw: dict[str, Any] = PUBLISHED[name]["config"]
    layers = max(2, raw["num_hidden_layers"])
    types = {"layer_types": ["full_attention"] * layers} if "layer_types" in raw else {}
    fewer = {key: value for key, value in FEWER.items() if raw.get(key)}
    ids = {key: None for key in raw if key.endswith("_token_id")}  # those of a large vocabulary
    return {**raw, **SMALL, **fewer, **ids, **types, "num_hidden_layers": layers}


def width_of(raw: dict[str, Any]) -> int:
    return raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]


def random_tensors(raw: dict[str, Any]) -> dict[str, Tensor]:
    """Under the hub's names. Qwen2 has biases, Qwen3 norms of query and key; a2d- stores its head
    although it is the embedding.
    """
    kind, width, hidden = raw["model_type"], width_of(raw), raw["hidden_size"]
    q, kv = raw["num_attention_heads"] * width, raw["num_key_value_heads"] * width
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for norm in ("input", "post_attention"):
            shapes[f"{at}.{norm}_layernorm.weight"] = (hidden,)
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{at}.self_attn.{part}_proj.weight"] = (rows, hidden)
            if kind in ("a2d-qwen2", "Fast_dLLM_Qwen"):
                shapes[f"{at}.self_attn.{part}_proj.bias"] = (rows,)
            if kind in ("sdar", "sdar_moe", "rnd1") and part != "v":
                shapes[f"{at}.self_attn.{part}_norm.weight"] = (width,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, q)
        experts, inside = [f"{at}.mlp"], raw["intermediate_size"]
        if "num_experts" in raw:
            shapes[f"{at}.mlp.gate.weight"] = (raw["num_experts"], hidden)
            experts = [f"{at}.mlp.experts.{i}" for i in range(raw["num_experts"])]
            inside = raw["moe_intermediate_size"]
        for expert in experts:
            shapes |= {f"{expert}.{part}_proj.weight": (inside, hidden) for part in ("gate", "up")}
            shapes[f"{expert}.down_proj.weight"] = (hidden, inside)
    torch.manual_seed(0)
    tensors = {key: torch.randn(shape) * 0.2 for key, shape in shapes.items()}
    tensors = {k: 1 + t if "norm" in k else t for k, t in tensors.items()}
    embedding = torch.randn(raw["vocab_size"], hidden) * 0.5
    tensors["model.embed_tokens.weight"] = embedding
    if not raw["tie_word_embeddings"]:
        tensors["lm_head.weight"] = torch.randn(raw["vocab_size"], hidden) * 0.2
    elif kind == "a2d-qwen2":
        tensors["lm_head.weight"] = embedding.clone()
    return tensors


def plain_logits(raw: dict[str, Any], stored: dict[str, Tensor], ids: Tensor, seen: Tensor) -> Any:
    """One text, in float64, layer by layer and expert by expert."""
    t = {key: tensor.double() for key, tensor in stored.items()}
    width, groups = width_of(raw), raw["num_attention_heads"] // raw["num_key_value_heads"]
    turns = raw["rope_theta"] ** (-torch.arange(0, width, 2).double() / width)
    angles = (torch.arange(len(ids))[:, None] * turns).repeat(1, 2)

    def norm(x: Tensor, key: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + raw["rms_norm_eps"]).rsqrt() * t[key]

    def rope(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-b, a], -1) * angles.sin()

    def swiglu(x: Tensor, at: str) -> Tensor:
        gate, up = (linear(x, t[f"{at}.{part}_proj.weight"]) for part in ("gate", "up"))
        return linear(silu(gate) * up, t[f"{at}.down_proj.weight"])

    x = t["model.embed_tokens.weight"][ids]
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}.self_attn"
        h, parts = norm(x, f"model.layers.{layer}.input_layernorm.weight"), {}
        for part in "qkv":
            key = f"{at}.{part}_proj"
            heads = linear(h, t[f"{key}.weight"], t.get(f"{key}.bias")).unflatten(-1, (-1, width))
            if f"{at}.{part}_norm.weight" in t:
                heads = norm(heads, f"{at}.{part}_norm.weight")
            heads = heads.transpose(0, 1)
            turned = part != "v" and raw.get("no_rope_layers", [1] * (layer + 1))[layer]
            heads = rope(heads) if turned else heads
            parts[part] = heads if part == "q" else heads.repeat_interleave(groups, 0)
        scores = parts["q"] @ parts["k"].mT / width**0.5
        attended = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ parts["v"]
        x = x + linear(attended.transpose(0, 1).flatten(1), t[f"{at}.o_proj.weight"])

        at = f"model.layers.{layer}.mlp"
        h = norm(x, f"model.layers.{layer}.post_attention_layernorm.weight")
        if f"{at}.gate.weight" not in t:
            x = x + swiglu(h, at)
            continue
        router = linear(h, t[f"{at}.gate.weight"]).softmax(-1)
        share, chosen = router.topk(raw["num_experts_per_tok"])
        share = share / share.sum(-1, keepdim=True)
        for place, row in enumerate(h):
            for weight, expert in zip(share[place], chosen[place].tolist(), strict=True):
                x[place] += weight * swiglu(row, f"{at}.experts.{expert}")
    x = norm(x, "model.norm.weight")
    return linear(x, t.get("lm_head.weight", t["model.embed_tokens.weight"]))


@pytest.mark.parametrize("name", NAMES)
def test_a_published_layout_gives_the_logits_of_a_plain_forward(name: str, tmp_path: Path) -> None:
    raw = small_config(name)
    tensors = random_tensors(raw)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    checkpoint, architecture = open_checkpoint(str(tmp_path)), PUBLISHED[name]["architecture"]
    model: Any = load_model(checkpoint, architecture, torch.float32)
    blocks = torch.arange(10) // 4  # a mask that is neither causal nor full
    ids, seen = torch.randint(0, 64, (10,)), blocks[:, None] >= blocks
    with torch.no_grad():
        logits = model(ids[None], attention_mask=seen[None, None]).logits[0]
    expected = plain_logits(raw, tensors, ids, seen)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    assert torch.equal(head_rows(checkpoint, architecture), head)
