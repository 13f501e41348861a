"""Losses and their gradients on the student's logits: losses.json and losses.safetensors.

Tolerance: 1e-5 relative, plus the resolution of float32 for sums of order T² (a KL between near-equal
distributions is a small difference of such sums). One deviation is ours on purpose: the reference clamps the
student's chunk probability to [1e-7, 1 − 1e-7], which zeroes the gradient of forward CALM where the student is
most wrong. Where that clamp is active in a case, the case is compared with the clamp put back, and counted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.conformance.result import Group, absent, load_tensors
from shared.cache.levels import LARGEST_ODDS
from shared.settings.objectives import Tidal
from shared.system.errors import TideError
from student_train.losses import calm, tidal
from student_train.losses.divergence import token_divergence
from student_train.losses.targets import TopKTargets
from student_train.losses.tidal import strength_at, timestep_weight, training_strength

_RELATIVE = 1e-5
_FLOAT32 = torch.finfo(torch.float32).eps
_TOKEN = {"kl": False, "reverse_kl": True, "tidal_kl": False, "tidal_reverse_kl": True}
"""Whether the divergence is reverse."""
_CHUNK = {
    "calm": calm.calm,
    "reverse_calm": calm.reverse_calm,
    "tidal_calm": calm.calm,
    "tidal_reverse_calm": calm.reverse_calm,
}


def loss_groups(folder: Path) -> list[Group]:
    """One group an objective, values and gradients together."""
    path = folder / "losses.json"
    if not path.exists():
        return absent(path.name)
    tensors = load_tensors(folder / "losses.safetensors")
    groups: dict[str, Group] = {}
    try:
        document = json.loads(path.read_text())
        for case in document["cases"]:
            name = case["objective"]
            group = groups.setdefault(name, Group(name))
            if name in _TOKEN:
                loss, logits = _token_case(case, tensors)
                clamped = 0
            elif name in _CHUNK:
                loss, logits, clamped = _chunk_case(case, tensors, document["spans_student"])
            else:
                group.failed, group.note = group.failed + 1, "unknown objective"
                continue
            loss.backward()
            assert logits.grad is not None
            _compare(group, case, loss.detach(), logits.grad, tensors[f"grad/{case['name']}"])
            if clamped:
                group.note = "the reference's clamp is active: compared with it put back"
    except (json.JSONDecodeError, KeyError) as error:
        raise TideError(f"{path} has another layout: {error!r}") from error
    return list(groups.values())


def _compare(
    group: Group, case: dict[str, Any], loss: Tensor, gradient: Tensor, expected: Tensor
) -> None:
    """Count the case by the larger of the relative differences of value and gradient."""
    value_size, gradient_size = abs(case["loss"]) or 1.0, float(expected.norm()) or 1.0
    value = abs(float(loss) - case["loss"]) / value_size
    slope = float((gradient - expected).norm()) / gradient_size
    resolution = max(_FLOAT32 * case["temperature"] ** 2 / value_size, _FLOAT32 / gradient_size)
    group.add(max(value, slope), _RELATIVE + resolution)


def _tidal(case: dict[str, Any]) -> Tidal | None:
    if "axis" not in case:
        return None
    return Tidal(
        case["lambda_init"],
        case["lambda_max"],
        case["axis"],
        case["schedule"],
        case["timestep_weight"],
    )


def _token_case(case: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logits = tensors["student_logits"].clone().requires_grad_()
    masked, temperature = tensors["masked"].bool(), case["temperature"]
    t = tensors["t"][:, None].expand(masked.shape)[masked]
    teacher = torch.log_softmax(tensors["teacher_logits"][masked], dim=-1)
    ids = torch.arange(teacher.shape[1]).expand_as(teacher)
    empty = torch.full((len(teacher),), -LARGEST_ODDS)  # k = V: nothing is outside the top-k
    topk = TopKTargets(ids, teacher, torch.ones_like(ids, dtype=torch.bool), {temperature: empty})
    weight, mixed, settings = torch.ones_like(t), None, _tidal(case)
    if settings is not None:
        mixed = strength_at(settings, training_strength(settings, case["progress"]), t)
        weight = timestep_weight(settings.timestep_weight, t)
    per_position = token_divergence(
        logits[masked], topk, temperature, mixed, _TOKEN[case["objective"]]
    )
    return temperature**2 * (weight * per_position).sum() / masked.sum(), logits


def _chunk_case(
    case: dict[str, Any], tensors: dict[str, Tensor], spans: list[list[list[int]]]
) -> tuple[Tensor, Tensor, int]:
    logits = tensors["chunk/student_logits"].clone().requires_grad_()
    active, temperature = tensors["chunk/active"].bool(), case["temperature"]
    _, length, vocabulary = logits.shape
    token_logp = calm.token_log_likelihood(
        logits.reshape(-1, vocabulary), tensors["chunk/student_ids"].reshape(-1)
    )
    flat = [(b * length + i, b * active.shape[1] + c) for b, row in enumerate(spans) for c, (x, y) in enumerate(row)
            for i in range(x, y)]  # fmt: skip
    rows, owners = torch.tensor(flat).unbind(1)
    chunk_logp = calm.chunk_log_likelihood(token_logp, rows, owners, active.numel()).view(
        active.shape
    )
    log_student = chunk_logp[active] / temperature
    target = calm.bound_probability(
        (tensors["chunk/teacher_chunk_logp"][active] / temperature).exp()
    )
    t = tensors["chunk/t"][:, None].expand(active.shape)[active]
    weight, settings = torch.ones_like(t), _tidal(case)
    if settings is not None:
        lam = strength_at(settings, training_strength(settings, case["progress"]), t)
        target = tidal.tidal_probability(log_student.detach().exp(), target, lam)
        weight = timestep_weight(settings.timestep_weight, t)
    clamped = 0
    if case["objective"] in ("calm", "tidal_calm"):
        p = log_student.detach().exp()
        clamped = int(((p < calm.TEACHER_BOUND) | (p > 1 - calm.TEACHER_BOUND)).sum())
    if clamped:
        log_student = calm.bound_probability(log_student.exp()).log()
    per_chunk = _CHUNK[case["objective"]](log_student, target)
    return (weight * per_chunk).sum() / active.sum(), logits, clamped
