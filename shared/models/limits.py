"""How large a model may say that it is. A config of a billion layers would be built for days, or until memory ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.system.errors import TideError

_LAYERS, _EXPERTS, _WIDTH, _VOCABULARY = 1024, 4096, 1 << 18, 1 << 24
_MOST = {
    **dict.fromkeys(("num_hidden_layers", "n_layers"), _LAYERS),
    **dict.fromkeys(("num_experts", "num_experts_per_tok", "num_shared_experts"), _EXPERTS),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_key_value_heads", "n_kv_heads"), _EXPERTS),
    **dict.fromkeys(("hidden_size", "d_model", "head_dim"), _WIDTH),
    **dict.fromkeys(
        ("intermediate_size", "mlp_hidden_size", "moe_intermediate_size", "dense_intermediate_size",
         "expert_intermediate_size"), 8 * _WIDTH,
    ),
    **dict.fromkeys(("vocab_size", "embedding_size"), _VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "max_sequence_length"), 1 << 30),
}  # fmt: skip
_MOST_MODULES = 1 << 18
"""Layers times experts."""


def refuse_sizes(config: Mapping[str, Any], source: str) -> None:
    """TideError where a size in a checkpoint's config is no positive number, or beyond any model."""
    for name, most in _MOST.items():
        size = config.get(name)
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= most:
            raise TideError(
                f"{name} in the config of {source} is {str(size)[:100]}",
                expected=f"a whole number up to {most:,}",
                fix="download config.json again",
            )
    layers = config.get("num_hidden_layers") or config.get("n_layers") or 1
    if layers * (config.get("num_experts") or 1) > _MOST_MODULES:
        raise TideError(
            f"the config of {source} asks for {layers:,} layers of {config['num_experts']:,} experts",
            expected=f"at most {_MOST_MODULES:,} experts in all",
            fix="download config.json again",
        )
