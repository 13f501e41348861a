"""Does this installation reproduce the reference implementation's numbers? `make conformance
GOLDEN=DIR ARGS="--only losses|masks|alignment|models|sampler|step"`.

`DIR` is laid out as `tests/golden`: losses.json and losses.safetensors, bd3lm_masks.safetensors,
alignment.json, checkpoints with config.json and expected.safetensors, step/step.json. What is not
there is left out.
"""

import argparse
import sys
from pathlib import Path

from tests.conformance import parts, step

PARTS = {
    "losses": parts.loss_groups, "masks": parts.mask_groups, "alignment": parts.alignment_groups,
    "models": parts.model_groups, "sampler": parts.sampler_groups, "step": step.step_groups,
}  # fmt: skip
FILES = {
    "losses": "losses.json", "masks": "bd3lm_masks.safetensors", "alignment": "alignment.json",
    "step": "step/step.json",
}  # fmt: skip


def run_conformance(folder: Path, only: str | None = None) -> bool:
    """Print a line a group and the count; True when all passed. ValueError: nothing is there."""
    passed = failed = 0
    for part in [only] if only else PARTS:
        for group in PARTS[part](folder) if (folder / FILES.get(part, "")).exists() else []:
            state = "FAILED" if group.failed else "ok"
            count = f"{group.passed}/{group.passed + group.failed}"
            line = f"{part:<10} {group.name:<38} {state:<8} {count:>9}   worst {group.worst:.1e}"
            print(f"{line}   {group.note}".rstrip(), flush=True)
            passed += group.passed
            failed += group.failed
    if passed + failed == 0:
        raise ValueError(f"{folder} holds nothing to check")
    print(f"{passed} passed, {failed} failed")
    return failed == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.conformance")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=PARTS)
    arguments = parser.parse_args()
    sys.exit(0 if run_conformance(arguments.folder, arguments.only) else 1)
