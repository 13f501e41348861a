"""`tide conformance DIR`: recompute a folder of reference numbers, one line per group of cases.

The layout is that of `golden/` (DESIGN §4). What a folder does not hold is said and skipped; a folder that holds
nothing of it is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipelines.conformance.alignment import alignment_groups
from pipelines.conformance.losses import loss_groups
from pipelines.conformance.masks import mask_groups
from pipelines.conformance.models import model_groups
from pipelines.conformance.result import Group
from pipelines.conformance.sampler import sampler_groups
from pipelines.conformance.step import step_groups
from shared.system.errors import TideError

PARTS: dict[str, Callable[[Path], list[Group]]] = {
    "losses": loss_groups,
    "masks": mask_groups,
    "alignment": alignment_groups,
    "models": model_groups,
    "sampler": sampler_groups,
    "step": step_groups,
}


def run_conformance(folder: Path, only: str | None = None) -> bool:
    """Print a line per group and a closing count; True when nothing failed."""
    if not folder.is_dir():
        raise TideError(f"there is no folder {folder}", expected="a folder of golden numbers")
    if only is not None and only not in PARTS:
        raise TideError(f"unknown part {only!r}", expected=f"one of {', '.join(PARTS)}")
    passed = failed = skipped = 0
    for name, compute in PARTS.items():
        if only not in (None, name):
            continue
        for group in compute(folder):
            print(f"{name:<10} {group.line()}", flush=True)
            passed, failed, skipped = (
                passed + group.passed,
                failed + group.failed,
                skipped + group.skipped,
            )
    if passed + failed == 0:
        raise TideError(
            f"{folder} holds nothing to check" + (f" for {only}" if only else ""),
            expected="losses.json and losses.safetensors, bd3lm_masks.safetensors, alignment.json, model folders, or "
            "step/step.json",
        )
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return failed == 0
