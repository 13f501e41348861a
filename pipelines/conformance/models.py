"""Logits of tiny checkpoints in the hub's own layouts: every folder with config.json and expected.safetensors.

The keys of expected.safetensors name the attention: `logits` and `logits_full_attention` (full),
`logits_block_causal_N`, `logits_bd3lm_block_N` (the student under the training mask).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.conformance.result import Group, absent, load_tensors
from shared.attention import block_causal, block_diffusion_batch, full, repeat_positions
from teacher_cache.teachers.architectures import ARCHITECTURES
from teacher_cache.teachers.loading import load_model, open_checkpoint

_TOLERANCE = 1e-5


def model_groups(folder: Path) -> list[Group]:
    """One group a checkpoint and attention mode; a case is one sequence."""
    names = sorted(p.parent for p in folder.glob("*/expected.safetensors") if (p.parent / "config.json").exists())
    return [group for name in names for group in _checkpoint_groups(name)] or absent("checkpoints")


def _checkpoint_groups(folder: Path) -> list[Group]:
    checkpoint = open_checkpoint(str(folder))
    kind = checkpoint.config.get("model_type")
    known = [name for name, a in ARCHITECTURES.items() if kind in a.model_types]
    if not known:
        return [Group(folder.name, skipped=1, note=f"no architecture for model_type {kind!r}")]
    model = load_model(checkpoint, known[0], torch.float32)
    expected = load_tensors(folder / "expected.safetensors")
    groups = []
    for key in sorted(k for k in expected if k.startswith("logits")):
        with torch.inference_mode():
            logits = _logits(model, key, expected)
        group = Group(f"{folder.name} {key.removeprefix('logits').strip('_') or 'full_attention'}")
        groups.append(group)
        if logits is None:
            group.skipped, group.note = 1, "no such attention mode in this version"
            continue
        difference = (logits - expected[key]).abs().flatten(1).amax(1)
        for value in difference.tolist():
            group.add(value, _TOLERANCE)
    return groups


def _logits(model: Any, key: str, expected: dict[str, Tensor]) -> Tensor | None:
    ids = expected.get("input_ids", expected.get("noised_ids"))
    if ids is None:
        return None
    valid = torch.ones_like(ids, dtype=torch.bool)
    if key in ("logits", "logits_full_attention"):
        return model(input_ids=ids, attention_mask=full(valid)).logits
    if match := re.fullmatch(r"logits_block_causal_(\d+)", key):
        return model(input_ids=ids, attention_mask=block_causal(valid, int(match[1]))).logits
    if match := re.fullmatch(r"logits_bd3lm_block_(\d+)", key):
        batch, length = ids.shape
        both = torch.cat([ids, expected["clean_ids"]], dim=1)
        mask = block_diffusion_batch(valid, int(match[1]))
        positions = repeat_positions(length, batch)
        return model(input_ids=both, attention_mask=mask, position_ids=positions).logits[:, :length]
    return None
