"""The rows of a checkpoint's LM head, without the rest of the model."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from shared.models.architectures import ARCHITECTURES
from shared.models.checkpoint import Checkpoint, stream_tensors
from shared.models.key_maps import place
from shared.system.errors import TideError

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def architecture_of(checkpoint: Checkpoint) -> str:
    """The first architecture that takes a config of this model type. TideError where none does."""
    kind = checkpoint.config.get("model_type")
    for name, architecture in ARCHITECTURES.items():
        if kind in architecture.model_types:
            return name
    raise TideError(
        f"{checkpoint.folder} has a config of model_type {kind!r}",
        expected="a model type of one of " + ", ".join(sorted(ARCHITECTURES)),
    )


def head_rows(checkpoint: Checkpoint, architecture: str) -> Float[Tensor, "vocab width"]:
    """The LM head's rows in float32; the embedding's where the two are tied. TideError where there are none."""
    kind = ARCHITECTURES[architecture]
    config = kind.config(checkpoint.config)
    found: dict[str, Tensor] = {}
    for key, tensor in stream_tensors(checkpoint.weight_files):
        for target in place(key, kind.rules, config):
            if target.name in (_HEAD, _EMBEDDING):
                found[target.name] = tensor
    name = _HEAD if _HEAD in found and not config.tie_word_embeddings else _EMBEDDING
    if name not in found:
        raise TideError(f"{checkpoint.folder} has no {name}", fix="download the checkpoint again")
    return found[name].to(torch.float32)
