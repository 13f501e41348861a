"""Does this installation reproduce the reference implementation's numbers? `python -m
tests.conformance DIR`.

`DIR` is laid out as `tests/golden`: losses.json and losses.safetensors, bd3lm_masks.safetensors,
alignment.json, checkpoints with config.json and expected.safetensors, step/step.json. What is not
there is left out.
"""

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Group:
    """One line of the report: how many cases held, and by how much the worst one missed."""

    name: str
    passed: int = 0
    failed: int = 0
    worst: float = 0.0
    note: str = ""

    def add(self, difference: float, tolerance: float) -> None:
        """Count a case; a difference that is NaN fails."""
        good = difference <= tolerance
        self.passed += good
        self.failed += not good
        self.worst = difference if math.isnan(difference) else max(self.worst, difference)


def run_conformance(folder: Path, only: str | None = None) -> bool:
    """Print a line a group and the count; True when nothing failed. ValueError where nothing is
    there to check.
    """
    from tests.conformance import parts, step

    compute = {
        "losses": parts.loss_groups,
        "masks": parts.mask_groups,
        "alignment": parts.alignment_groups,
        "models": parts.model_groups,
        "sampler": parts.sampler_groups,
        "step": step.step_groups,
    }
    passed = failed = 0
    for part in [only] if only else compute:
        for group in compute[part](folder):
            state = "FAILED" if group.failed else "ok"
            count = f"{group.passed}/{group.passed + group.failed}"
            line = f"{part:<10} {group.name:<38} {state:<8} {count:>9}   worst {group.worst:.1e}"
            print(line + (f"   {group.note}" if group.note else ""), flush=True)
            passed += group.passed
            failed += group.failed
    if passed + failed == 0:
        raise ValueError(
            f"{folder} holds nothing to check; tests/conformance says what it may hold"
        )
    print(f"{passed} passed, {failed} failed")
    return failed == 0
