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

from pipelines.conformance.result import Group, absent, known_architecture, load_tensors
from shared.diffusion.attention import block_diffusion_batch, repeat_positions
from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model
from teacher_cache.engines.inputs import build_inputs, observed_first
from teacher_cache.method.comp_demo import Request
from teacher_cache.teachers.registry import Attention, BlockCausal, Full, Native, X0Xt

_TOLERANCE = 1e-5


def model_groups(folder: Path) -> list[Group]:
    """One group a checkpoint and attention mode; a case is one sequence."""
    names = sorted(
        p.parent
        for p in folder.glob("*/expected.safetensors")
        if (p.parent / "config.json").exists()
    )
    return [group for name in names for group in _checkpoint_groups(name)] or absent("checkpoints")


def _checkpoint_groups(folder: Path) -> list[Group]:
    checkpoint = open_checkpoint(str(folder))
    known = known_architecture(checkpoint)
    if known is None:
        kind = checkpoint.config.get("model_type")
        return [Group(folder.name, skipped=1, note=f"no architecture for model_type {kind!r}")]
    model = load_model(checkpoint, known, torch.float32)
    expected = load_tensors(folder / "expected.safetensors")
    groups = []
    for key in sorted(k for k in expected if k.startswith("logits")):
        with torch.inference_mode():
            logits = _logits(model, key, expected, checkpoint.config.get("mask_token_id", 0))
        group = Group(f"{folder.name} {key.removeprefix('logits').strip('_') or 'full_attention'}")
        groups.append(group)
        if logits is None:
            group.skipped, group.note = 1, "no such attention mode in this version"
            continue
        target = expected[key] if expected[key].ndim == 3 else expected[key][None]
        difference = (logits - target).abs().flatten(1).amax(1)
        for value in difference.tolist():
            group.add(value, _TOLERANCE)
    return groups


def _logits(model: Any, key: str, expected: dict[str, Tensor], mask_id: int) -> Tensor | None:
    """Logits in the mode that the key names, at the positions of the (noised) sequence; None if it is unknown."""
    ids, valid = _ids(expected, mask_id)
    if match := re.fullmatch(r"logits_bd3lm_block_(\d+)", key):
        batch, length = ids.shape
        both = torch.cat([ids, expected["clean_ids"]], dim=1)
        mask = block_diffusion_batch(valid, int(match[1]))
        positions = repeat_positions(length, batch)
        return model(input_ids=both, attention_mask=mask, position_ids=positions).logits[:, :length]
    attention = _attention(key)
    if attention is None:
        return None
    requests = [_request(row, clean) for row, clean in zip(ids, _clean(expected, ids), strict=True)]
    found = []
    for request in requests:
        inputs = build_inputs(attention, [request])
        logits = model(
            input_ids=inputs.ids, attention_mask=inputs.mask, position_ids=inputs.positions
        ).logits[0]
        found.append(_in_order(attention, logits, request))
    return torch.stack(found)


def _attention(key: str) -> Attention | None:
    if key in ("logits", "logits_full_attention"):
        return Full()
    for name, kind in (("block_causal", BlockCausal), ("native", Native), ("x0_xt", X0Xt)):
        if match := re.fullmatch(rf"logits_{name}_block_(\d+)|logits_{name}_(\d+)", key):
            return kind(int(match[1] or match[2]))
    return None


def _ids(expected: dict[str, Tensor], mask_id: int) -> tuple[Tensor, Tensor]:
    """The model's (noised) ids, and that all of them are real."""
    if "masked" in expected:
        ids = torch.where(expected["masked"].bool(), mask_id, expected["clean_ids"])[None]
    else:
        ids = expected["input_ids"] if "input_ids" in expected else expected["noised_ids"]
    return ids, torch.ones_like(ids, dtype=torch.bool)


def _clean(expected: dict[str, Tensor], ids: Tensor) -> Tensor:
    clean = expected.get("clean_ids", ids)
    return clean if clean.ndim == 2 else clean[None]


def _request(ids: Tensor, clean: Tensor) -> Request:
    read = (ids != clean).nonzero()[:, 0]
    return Request(ids.int().numpy(), read.int().numpy(), clean[read].int().numpy())


def _in_order(attention: Attention, logits: Tensor, request: Request) -> Tensor:
    """Rows of the noised copy in the order of the sequence."""
    match attention:
        case X0Xt():
            return logits[len(request.ids) :]
        case Native(block=block):
            order = torch.from_numpy(observed_first(request, block)).long()
            ordered = logits[len(request.ids) :][torch.argsort(order)]
            read = torch.from_numpy(
                request.read
            ).long()  # the reference fills in the masked rows alone
            return torch.zeros_like(ordered).index_copy(0, read, ordered[read])
        case _:
            return logits
