"""The hub's own tensors under the names of the stock architecture, one by one, for vLLM's loaders.

vLLM stacks experts itself, so an expert's matrix keeps its own name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedConfig

from shared.models.architectures import ARCHITECTURES, FUSED_QKV, SPLIT_QKV, split_qkv


def stock_weights(
    weights: Iterable[tuple[str, torch.Tensor]], architecture: str, config: PreTrainedConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Renamed and split tensors. Keys must be known: `loading.check_weights` has seen to that."""
    kind, tied = ARCHITECTURES[architecture], bool(config.tie_word_embeddings)
    for key, tensor in weights:
        name = kind.stock_name(key)
        if FUSED_QKV in name:
            for part, rows in zip(SPLIT_QKV, split_qkv(tensor, config), strict=True):
                yield name.replace(FUSED_QKV, part), rows
        elif not (tied and name == "lm_head.weight"):
            yield name, tensor
