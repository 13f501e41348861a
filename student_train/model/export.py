"""Write a trained student in another layout: as transformers loads it, or as the reference's `a2d-qwen3`.

Both hold the same tensors under the same names; the config differs, and the reference stores tied weights twice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save

from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import load_model
from shared.system.atomic import new_folder, write_bytes
from shared.system.errors import TideError
from shared.text.tokenizers import Tokenizer
from student_train.model.card import CARD
from student_train.model.saving import save_student
from student_train.model.student import student_architecture

Format = Literal["hf", "a2d"]


def export_student(source: Path, target: Path, layout: Format) -> None:
    """Read the checkpoint `source` (either layout) and write it to `target`; tensors keep every bit.

    Raises TideError where `source` is no student (for a2d: no Qwen3 one), or `target` holds something already.
    """
    checkpoint = open_checkpoint(resolve(str(source)))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TideError(f"{target} is not empty", fix="choose another folder")
    architecture = student_architecture(checkpoint)
    if layout == "a2d" and architecture != "qwen3":
        raise TideError(
            f"{source} is a {architecture} student",
            expected="a Qwen3 one: a2d-qwen3 is a layout of Qwen3 only",
            fix="use --format hf",
        )
    model: Any = load_model(checkpoint, architecture, _stored_dtype(checkpoint.config))
    if "block_size" in checkpoint.config:
        model.config.block_size = checkpoint.config[
            "block_size"
        ]  # no field of the stock class, and kept by it
    tokenizer = Tokenizer.load(checkpoint.folder)
    with new_folder(target) as half:
        if layout == "hf":
            save_student(model, tokenizer, half)
        else:
            tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
            tensors["lm_head.weight"] = model.lm_head.weight.detach().clone()
            write_bytes(half / "model.safetensors", save(tensors, {"format": "pt"}))
            config = {**_a2d_config(model.config), "dtype": str(model.dtype).removeprefix("torch.")}
            write_bytes(half / "config.json", (json.dumps(config, indent=2) + "\n").encode())
            tokenizer.backend.save_pretrained(half)
        for name in (CARD, "LICENSE"):
            if (checkpoint.folder / name).is_file():
                write_bytes(half / name, (checkpoint.folder / name).read_bytes())


def _stored_dtype(config: dict[str, Any]) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, str(name))


def _a2d_config(config: Any) -> dict[str, Any]:
    """The reference's config: Qwen3's fields as its transformers version writes them."""
    values = config.to_diff_dict()
    rope = values.pop("rope_parameters", None) or config.rope_parameters
    values |= {
        "architectures": ["A2DQwen3LMHeadModel"],
        "model_type": "a2d-qwen3",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
                 "attention_bias"):  # fmt: skip
        values[name] = getattr(config, name)
    return values
