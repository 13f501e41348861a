"""Decoder layers compiled one by one: one graph for all of them and for all lengths."""

from __future__ import annotations

from typing import Any


def compile_layers(model: Any) -> None:
    """Compile each decoder layer in place (torch.compile). Weights keep their names; the layers share what is compiled,
    and sizes are symbols of it, so that an epoch of batches of many lengths compiles nothing anew.
    """
    for layer in model.model.layers:
        layer.compile(dynamic=True)
