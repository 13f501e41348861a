"""A student's folder: as transformers loads it, or as the reference's `a2d-qwen3`.

Both hold the same tensors under the same names; the config differs, and the reference stores tied
weights twice.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from transformers import GenerationConfig

from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import load_model
from shared.system.errors import TideError
from shared.system.files import new_folder, write_bytes
from shared.text.tokenizers import Tokenizer
from student_train.model.card import CARD
from student_train.model.student import student_architecture

Format = Literal["hf", "a2d"]

_A2D_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "attention_bias", "tie_word_embeddings",
)  # fmt: skip


def save_student(
    model: Any, tokenizer: Tokenizer, folder: Path, state: dict[str, Any] | None = None
) -> None:
    """Write weights, config, generation config and tokenizer, as transformers loads them.

    `state` holds the weights where the model's own are sharded.
    """
    # What ends a response: EOS and the chat template's end of turn, as in sampling.
    stated = model.config.eos_token_id
    ends = stated if isinstance(stated, list) else [stated]
    ends = [*ends, tokenizer.backend.eos_token_id, *tokenizer.turn_ends]
    model.generation_config = GenerationConfig(
        eos_token_id=list(dict.fromkeys(int(token) for token in ends if token is not None)),
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(folder, state_dict=state)
    tokenizer.backend.save_pretrained(folder)


def export_student(source: Path, target: Path, layout: Format) -> None:
    """Read the checkpoint `source` (either layout) and write it to `target`, bit for bit.

    TideError where `source` is no student (for a2d: no Qwen3 one) or `target` holds something.
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
    stored = checkpoint.config
    dtype = getattr(torch, stored.get("dtype") or stored.get("torch_dtype") or "float32")
    model: Any = load_model(checkpoint, architecture, dtype)
    if "block_size" in stored:  # no field of the stock class, which keeps it all the same
        model.config.block_size = stored["block_size"]
    tokenizer = Tokenizer.load(checkpoint.folder)
    with new_folder(target) as half:
        if layout == "hf":
            save_student(model, tokenizer, half)
        else:
            tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
            tensors["lm_head.weight"] = model.lm_head.weight.detach().clone()
            write_bytes(half / "model.safetensors", save(tensors, {"format": "pt"}))
            config = _a2d_config(model.config, str(model.dtype).removeprefix("torch."))
            write_bytes(half / "config.json", (json.dumps(config, indent=2) + "\n").encode())
            tokenizer.backend.save_pretrained(half)
        for name in (CARD, "LICENSE"):
            if (checkpoint.folder / name).is_file():
                write_bytes(half / name, (checkpoint.folder / name).read_bytes())


def _a2d_config(config: Any, dtype: str) -> dict[str, Any]:
    """The reference's config: Qwen3's fields as its transformers version writes them."""
    values = config.to_diff_dict()
    rope = values.pop("rope_parameters", None) or config.rope_parameters
    values |= {name: getattr(config, name) for name in _A2D_FIELDS}
    return values | {
        "architectures": ["A2DQwen3LMHeadModel"],
        "model_type": "a2d-qwen3",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "dtype": dtype,
    }
