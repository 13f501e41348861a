"""The name `tide_bd3lm` in lm-eval's registry.

Releases of lm-eval that look for the entry points `lm_eval.models` find it without this (pyproject.toml); for those
that do not, `tide lm-eval` calls it first.
"""

from __future__ import annotations

NAME = "tide_bd3lm"
_TARGET = "pipelines.evaluation.model:TideBD3LM"


def register_model() -> None:
    """Let `--model tide_bd3lm` be found, without importing the model yet."""
    import lm_eval.models  # noqa: F401 - fills the registry
    from lm_eval.api.registry import model_registry

    if model_registry.get(NAME, None) is None:
        model_registry.register(NAME, target=_TARGET)
