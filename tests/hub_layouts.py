"""Random checkpoints in the hub's own layouts: the golden ones' tensor names, new shapes."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from shared.models.architectures import ARCHITECTURES, FUSED_QKV, SPLIT_QKV
from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model, meta_model

_WIDE = {"hidden_size": 128, "vocab_size": 160, "max_position_embeddings": 1024}
_WIDER: dict[str, dict[str, Any]] = {
    "llada": {"d_model": 128, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 96,
              "vocab_size": 160, "embedding_size": 160, "max_sequence_length": 1024},
    "dream": {**_WIDE, "intermediate_size": 96},
    "wedlm": {**_WIDE, "intermediate_size": 96, "head_dim": 32},
    "llada_moe": {**_WIDE, "expert_intermediate_size": 32, "dense_intermediate_size": 96},
    "llada2_moe": {**_WIDE, "intermediate_size": 96, "head_dim": 32, "moe_intermediate_size": 32},
}  # fmt: skip
ARCHITECTURE_OF = {name: name for name in _WIDER} | {"wedlm": "qwen3"}


def wide_checkpoint(golden: Path, name: str, folder: Path, seed: int = 0) -> Path:
    """A checkpoint laid out as `golden/name` with heads of 32 numbers, for vLLM's CPU kernels."""
    architecture = ARCHITECTURE_OF[name]
    raw = {**json.loads((golden / name / "config.json").read_text()), **_WIDER[name]}
    kind, model = ARCHITECTURES[architecture], meta_model(architecture, raw)
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    with safe_open(golden / name / "model.safetensors", "pt") as handle:
        for key in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            stock = kind.stock_name(key)
            if FUSED_QKV in stock:
                parts = [shapes[stock.replace(FUSED_QKV, part)] for part in SPLIT_QKV]
                shape = [sum(part[0] for part in parts), *parts[0][1:]]
            elif ".mlp.experts." in stock:  # one of a stacked tensor; gate and up share theirs
                stacked = "down_proj" if "down_proj" in stock else "gate_up_proj"
                shape = shapes[stock.split("experts.")[0] + "experts." + stacked][1:]
                shape = shape if stacked == "down_proj" else [shape[0] // 2, *shape[1:]]
            else:
                shape = shapes[stock]
            tensor = torch.randn(shape, generator=generator) * 0.15
            tensors[key] = 1 + tensor if len(shape) == 1 and "norm" in key else tensor
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    load_model(open_checkpoint(str(folder)), architecture, torch.float32)  # whole and fitting
    return folder
