"""What both sides of vLLM's process border share: the scorers' names, and the form of an answer.

The entry point `vllm.general_plugins` runs `register` in every vLLM process.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from teacher_cache.method.targets import Scores, ScoreTensors, TargetSpec, scores_of

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


# One request's scores travel as one float32 tensor, the only thing that a vLLM pooler can send back.
# Ids and sizes stay below 2²⁴ and are exact in float32.


def column_widths(spec: TargetSpec) -> list[int]:
    """Columns of each field of `ScoreTensors`, in their order."""
    t = len(spec.temperatures)
    if not spec.k:
        return [1, 1, 1, 0, 0, 0, 0]
    return [1, 1, 1, spec.k, spec.k, t, t * spec.classes if spec.classes > 1 else 0]


def pack(scores: ScoreTensors) -> Float[Tensor, "read columns"]:
    """What `targets.extract` returns, side by side."""
    cells = [scores.gold_logp[:, None], scores.logsumexp[:, None], scores.sizes[:, None], scores.ids,
             scores.logp, scores.odds, scores.class_mass.flatten(1)]  # fmt: skip
    return torch.cat([cell.float() for cell in cells], dim=1)


def unpack(packed: Float[Tensor, "read columns"], spec: TargetSpec) -> Scores:
    """The inverse, as arrays of their own."""
    cells = np.split(packed.float().numpy(), np.cumsum(column_widths(spec))[:-1], axis=1)
    gold, logsumexp, sizes = (cell[:, 0].copy() for cell in cells[:3])
    ids, logp, odds, mass = (cell.copy() for cell in cells[3:])
    mass = mass.reshape(len(mass), len(spec.temperatures), -1)
    return scores_of([gold, logsumexp, sizes, ids, logp, odds, mass], spec)
