"""One group of cases: how many held, and by how much the worst one missed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shared.models.architectures import ARCHITECTURES
from shared.models.checkpoint import Checkpoint
from shared.system.errors import TideError


@dataclass
class Group:
    """A line of the report. `worst` is the largest relative (or, for logits, absolute) difference."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    worst: float = 0.0
    note: str = ""

    def add(self, difference: float, tolerance: float) -> None:
        """Count one case; a difference that is no number fails."""
        good = difference <= tolerance
        self.passed += good
        self.failed += not good
        self.worst = float("nan") if math.isnan(difference) else max(self.worst, difference)

    def line(self) -> str:
        """The group as one line."""
        state = "FAILED" if self.failed else "skipped" if self.skipped and not self.passed else "ok"
        count = f"{self.passed}/{self.passed + self.failed}"
        text = f"{self.name:<38} {state:<8} {count:>9}   worst {self.worst:.1e}"
        return text + (f"   {self.note}" if self.note else "")


def absent(name: str) -> list[Group]:
    """The groups of a part whose file is not in the folder."""
    return [Group(name, skipped=1, note="not in this folder")]


def known_architecture(checkpoint: Checkpoint) -> str | None:
    """The architecture that a checkpoint's model_type belongs to; None where there is none."""
    kind = checkpoint.config.get("model_type")
    return next((name for name, a in ARCHITECTURES.items() if kind in a.model_types), None)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; TideError where it cannot be read."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise TideError(
            f"{path} is no whole safetensors file: {error}", fix="copy the folder again"
        ) from error
