"""`tide env`: what numbers and speed depend on, for a bug report."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from shared.system.hardware import describe_hardware

_PACKAGES = (
    "tide-distill", "transformers", "accelerate", "pyarrow", "vllm", "lm-eval", "bitsandbytes", "ray",
)  # fmt: skip


def describe_environment() -> list[str]:
    """A line a fact: hardware first, then versions of what is installed."""
    facts = [*describe_hardware(), *((name, _version(name)) for name in _PACKAGES)]
    return [f"{name:<16}{value}" for name, value in facts]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
