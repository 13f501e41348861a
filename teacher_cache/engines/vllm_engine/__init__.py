"""The vLLM engine: a plugin that registers scorers, and the engine that feeds them. Optional: the `vllm` extra."""
