"""The hub's own tensors under the names of the stock architecture, one by one, for vLLM's loaders.

The rules are those of `teachers.architectures`. vLLM stacks experts itself, so an expert's matrix keeps its own name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedConfig

from shared.models.architectures import ARCHITECTURES
from shared.models.key_maps import place


def stock_weights(
    weights: Iterable[tuple[str, torch.Tensor]], architecture: str, config: PreTrainedConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Renamed and split tensors. Keys must be known: `loading.check_weights` has seen to that."""
    rules = ARCHITECTURES[architecture].rules
    tied = bool(config.tie_word_embeddings)
    for key, tensor in weights:
        for spot in place(key, rules, config):
            if spot.expert is not None:
                yield key, tensor
            elif not (tied and spot.name == "lm_head.weight"):
                yield spot.name, tensor if spot.source is None else tensor[spot.source]
