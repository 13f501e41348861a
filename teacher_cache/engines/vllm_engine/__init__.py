"""The vLLM engine (the `vllm` extra): a plugin that registers scorers, and what feeds them."""
