"""What both sides of vLLM's process border share: the scorers' names, and the form of an answer.

The entry point `vllm.general_plugins` runs `register` in every vLLM process.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from teacher_cache.method.targets import Scores, TargetSpec

# The scorer of each stock transformers class that a teacher may load as.
SCORERS = {
    "LlamaForCausalLM": "TideLlamaScorer",
    "Qwen2ForCausalLM": "TideQwen2Scorer",
    "Qwen3ForCausalLM": "TideQwen3Scorer",
    "Qwen3MoeForCausalLM": "TideQwen3MoeScorer",
    "Glm4MoeForCausalLM": "TideGlm4MoeScorer",
}


def register() -> None:
    """Make every scorer known to vLLM. May run any number of times in one process."""
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]

    known = ModelRegistry.get_supported_archs()
    for name in SCORERS.values():
        if name not in known:
            ModelRegistry.register_model(name, f"teacher_cache.engines.vllm_engine.models:{name}")


def field_widths(spec: TargetSpec) -> dict[str, int]:
    """How many columns each field of `Scores` has in an answer: one float32 tensor a request.

    A vLLM pooler can send back nothing else. Ids and sizes stay below 2²⁴ and are exact in float32.
    """
    widths = {"gold_logp": 1, "logsumexp": 1}
    if spec.k:
        widths |= {"topk_sizes": 1, "topk_ids": spec.k, "topk_logp": spec.k}
        widths["tail_odds"] = len(spec.temperatures)
        if spec.classes > 1:
            widths["class_mass"] = len(spec.temperatures) * spec.classes
    return widths


def pack(fields: dict[str, Tensor], spec: TargetSpec) -> Float[Tensor, "read columns"]:
    """What `targets.extract` returns, side by side."""
    widths = field_widths(spec)
    cells = [cell.float().reshape(len(cell), widths[name]) for name, cell in fields.items()]
    return torch.cat(cells, dim=1)


def unpack(packed: Float[Tensor, "read columns"], spec: TargetSpec) -> Scores:
    """The inverse, as arrays of their own."""
    widths = field_widths(spec)
    cells = np.split(packed.float().numpy(), np.cumsum(list(widths.values()))[:-1], axis=1)
    fields = {name: cell.copy() for name, cell in zip(widths, cells, strict=True)}
    for name in ("gold_logp", "logsumexp", "topk_sizes"):
        if name in fields:
            fields[name] = fields[name][:, 0]
    for name in ("topk_sizes", "topk_ids"):
        if name in fields:
            fields[name] = fields[name].astype(np.int32)
    if "class_mass" in fields:
        shape = (len(packed), len(spec.temperatures), spec.classes)
        fields["class_mass"] = fields["class_mass"].reshape(shape)
    return Scores(**fields)
