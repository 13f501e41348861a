"""Block-diffusion masks, in both orders: bd3lm_masks.safetensors, keys nLENGTH-blockSIZE-ORDER."""

from __future__ import annotations

import re
from pathlib import Path

from pipelines.conformance.result import Group, absent, load_tensors
from shared.diffusion.attention import block_diffusion


def mask_groups(folder: Path) -> list[Group]:
    """One group an order; a case holds when every entry is equal."""
    path = folder / "bd3lm_masks.safetensors"
    if not path.exists():
        return absent(path.name)
    groups = {order: Group(order) for order in ("xt_x0", "x0_xt")}
    for key, expected in load_tensors(path).items():
        match = re.fullmatch(r"n(\d+)-block(\d+)-(xt_x0|x0_xt)", key)
        if match is None:
            groups.setdefault(key, Group(key, failed=1, note="unknown key"))
            continue
        length, block, order = int(match[1]), int(match[2]), match[3]
        mask = block_diffusion(length, block, "xt_x0" if order == "xt_x0" else "x0_xt")
        same_shape = mask.shape == expected.shape
        wrong = float((mask != expected.bool()).sum()) if same_shape else float("inf")
        groups[order].add(wrong, 0.0)
    return [group for group in groups.values() if group.passed or group.failed]
