"""Configurations of the student: its shape, or its checkpoint."""

from __future__ import annotations

from typing import Literal

from shared.settings.variants import require, strict


@strict
class ModelShape:
    """Sizes of a model that starts from random weights."""

    architecture: Literal["qwen3", "llama"] = "qwen3"
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 384

    def __post_init__(self) -> None:
        for name in ("hidden_size", "layers", "heads", "kv_heads", "intermediate_size"):
            require(
                getattr(self, name) > 0, f"{name} is {getattr(self, name)}; it must be positive"
            )
        require(
            self.hidden_size % (2 * self.heads) == 0,
            f"hidden_size is {self.hidden_size}; it must be an even multiple of heads ({self.heads})",
        )
        require(
            self.heads % self.kv_heads == 0,
            f"heads is {self.heads}; it must be a multiple of kv_heads ({self.kv_heads})",
        )


@strict
class StudentConfig(ModelShape):
    """The student: a checkpoint, or a new model of this shape with the cache's tokenizer."""

    checkpoint: str | None = None
    """Path or hub id of an `a2d-qwen3`, Qwen3 or Llama checkpoint; None starts from random weights."""
    add_mask_row: bool = False
    """Allow new embedding rows where the checkpoint has none for the mask token."""
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    """`auto`: flex_attention with a compiled block mask on CUDA, SDPA with a dense mask elsewhere."""
