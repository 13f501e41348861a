"""Decoder layers compiled one by one: one graph for all of them and for all lengths."""

from __future__ import annotations

from typing import Any


def compile_layers(model: Any) -> None:
    """Compile each decoder layer in place (torch.compile). Weights keep their names; the layers share what is compiled,
    and sizes are symbols of it, so that batches of other lengths compile nothing anew.

    Of a layer with experts, whose shapes depend on values, the attention alone.
    """
    for layer in model.model.layers:
        whole = not hasattr(layer.mlp, "experts")
        (layer if whole else layer.self_attn).compile(dynamic=True)
