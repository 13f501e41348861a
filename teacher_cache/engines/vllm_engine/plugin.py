"""Registers the scorers with vLLM. Its entry point `vllm.general_plugins` runs this in every vLLM process."""

from __future__ import annotations

SCORERS = {
    "LlamaForCausalLM": "TideLlamaScorer",
    "Qwen2ForCausalLM": "TideQwen2Scorer",
    "Qwen3ForCausalLM": "TideQwen3Scorer",
    "Qwen3MoeForCausalLM": "TideQwen3MoeScorer",
    "Glm4MoeForCausalLM": "TideGlm4MoeScorer",
}
"""The scorer of each stock transformers class that a teacher may load as (DESIGN §5)."""


def register() -> None:
    """Make every scorer known to vLLM. May run any number of times in one process."""
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]

    known = ModelRegistry.get_supported_archs()
    for name in SCORERS.values():
        if name not in known:
            ModelRegistry.register_model(name, f"teacher_cache.engines.vllm_engine.models:{name}")
