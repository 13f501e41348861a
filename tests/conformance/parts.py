"""Losses and gradients, masks, alignments, logits, samples: a function a part, a group a kind."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from shared.aligned.alignment import align_bytes, token_boundaries
from shared.diffusion import block_diffusion_places
from shared.models.checkpoint import open_checkpoint
from shared.models.loading import architecture_of, load_model
from shared.settings.build import build, strict
from shared.settings.config import Distillation, NoDistillation
from shared.text.byte_level import byte_level_bytes
from student_train.losses.objective import objective
from student_train.losses.targets import ChunkTargets, Targets, TopKTargets
from student_train.using.decoding import Decoding, Row, pad_left
from student_train.using.settings import SampleConfig, Special
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.method import Request, TargetSpec
from teacher_cache.teachers.registry import Attention, Full
from tests.plain_masks import block_diffusion_batch

RELATIVE = 1e-5
FLOAT32 = torch.finfo(torch.float32).eps
LOGITS = 1e-5  # absolute
REFERENCE_SPECIAL = Special(mask=95, eos=94)  # the checkpoint itself names the mask alone


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


@strict
class Variants:
    """The settings that golden files name by type."""

    distillation: Distillation = field(default_factory=NoDistillation)
    attention: Attention = field(default_factory=Full)


def load(folder: Path) -> Any:
    """A checkpoint in float32."""
    checkpoint = open_checkpoint(str(folder))
    return load_model(checkpoint, architecture_of(checkpoint), torch.float32)


def loss_groups(folder: Path) -> list[Group]:
    """A group an objective: 1e-5 relative, plus float32's resolution for sums of order T²."""
    tensors = load_file(folder / "losses.safetensors")
    document = json.loads((folder / "losses.json").read_text())
    groups: dict[str, Group] = {}
    for case in document["cases"]:
        name = case["objective"]
        settings: dict[str, Any] = {"temperature": case["temperature"]}
        settings["type"] = name.removeprefix("tidal_")
        if "axis" in case:
            keys = ("lambda_init", "lambda_max", "axis", "timestep_weight")
            settings["tidal"] = {key: case[key] for key in keys} | {"growth": case["schedule"]}
        distillation = build(Variants, {"distillation": settings}).distillation
        if "calm" in name:
            logits = tensors["chunk/student_logits"].clone().requires_grad_()
            targets = chunk_targets(tensors, document["spans_student"])
            count = int(tensors["chunk/active"].sum())
            rows = logits.flatten(0, 1)
        else:
            logits = tensors["student_logits"].clone().requires_grad_()
            targets = token_targets(tensors)
            count = len(targets.t)
            rows = logits[tensors["masked"].bool()]
        sums = objective(rows, targets, distillation, case.get("progress", 0.0))
        loss = sums.distillation / count
        loss.backward()
        assert logits.grad is not None
        expected = tensors[f"grad/{case['name']}"]
        value_size, gradient_size = abs(case["loss"]) or 1.0, float(expected.norm()) or 1.0
        value = abs(float(loss.detach()) - case["loss"]) / value_size
        slope = float((logits.grad - expected).norm()) / gradient_size
        # A KL of near-equal distributions is a small difference of sums of order T².
        resolution = max(FLOAT32 * case["temperature"] ** 2 / value_size, FLOAT32 / gradient_size)
        groups.setdefault(name, Group(name)).add(max(value, slope), RELATIVE + resolution)
    return list(groups.values())


def token_targets(tensors: dict[str, Tensor]) -> Targets:
    """The teacher's whole distribution at every masked position: k = V."""
    masked = tensors["masked"].bool()
    t = tensors["t"][:, None].expand(masked.shape)[masked]
    logits = tensors["teacher_logits"][masked]  # [masked, vocab]
    topk = TopKTargets.whole(logits, torch.ones(logits.shape[1], dtype=torch.bool))
    return Targets(torch.zeros_like(topk.ids[:, 0]), t, topk)


def chunk_targets(tensors: dict[str, Tensor], spans: list[list[list[int]]]) -> Targets:
    """Chunk likelihoods at every token of [batch · length]; only the active chunks count."""
    active, ids = tensors["chunk/active"].bool(), tensors["chunk/student_ids"]
    rows, chunk_of = [], []
    for number, (i, j) in enumerate(active.nonzero().tolist()):
        start, end = spans[i][j]
        rows += range(i * ids.shape[1] + start, i * ids.shape[1] + end)
        chunk_of += [number] * (end - start)
    t, logp = tensors["chunk/t"][:, None], tensors["chunk/teacher_chunk_logp"][active]
    own_t = t.expand(active.shape)[active]
    chunks = ChunkTargets(torch.tensor(rows), torch.tensor(chunk_of), logp, own_t)
    return Targets(ids.flatten(), t.expand(ids.shape).flatten(), None, chunks)


def mask_groups(folder: Path) -> list[Group]:
    """Block-diffusion masks in both orders; keys nLENGTH-blockSIZE-ORDER."""
    groups: dict[str, Group] = {}
    for key, expected in load_file(folder / "bd3lm_masks.safetensors").items():
        size, block, order = re.fullmatch(r"n(\d+)-block(\d+)-(\w+)", key).groups()  # type: ignore[union-attr]
        length = int(size)
        places = torch.arange(2 * length)  # of [x_t ; x_0]
        places = places if order == "xt_x0" else places.roll(length)
        mask = block_diffusion_places(places[None], length, int(block))[0, 0]
        wrong = float((mask != expected.bool()).sum())
        groups.setdefault(order, Group(order)).add(wrong, 0.0)
    return list(groups.values())


def alignment_groups(folder: Path) -> list[Group]:
    """Chunks of real texts between two tokenizers, whose tokens are given in byte-level form."""
    document = json.loads((folder / "alignment.json").read_text(encoding="utf-8"))
    group = Group(f"{document.get('teacher')} → {document.get('student')}")
    for case in document["cases"]:
        lengths = []
        for side in ("teacher_tokens", "student_tokens"):
            pieces = [byte_level_bytes(token) or token.encode() for token in case[side]]
            lengths.append(np.array([len(piece) for piece in pieces]))
        length, edges = min(int(own.sum()) for own in lengths), map(token_boundaries, lengths)
        chunks = align_bytes(next(edges), next(edges), length).tolist()
        group.add(float(chunks != case["chunks"]), 0.0)
    return [group]


def model_groups(folder: Path) -> list[Group]:
    """Logits of tiny checkpoints in the hub's own layouts, a group a checkpoint and attention mode.

    A key names its mode: `logits` and `logits_full_attention`, `logits_block_causal_N`,
    `logits_x0_xt_block_N`, `logits_native_block_N`, `logits_bd3lm_block_N` (a student's training).
    """
    groups = []
    for path in sorted(folder.glob("*/expected.safetensors")):
        expected = load_file(path)
        for key in sorted(k for k in expected if k.startswith("logits")):
            mode = key.removeprefix("logits").strip("_") or "full_attention"
            group = Group(f"{path.parent.name} {mode}")
            for difference in differences(load(path.parent), mode, expected, expected[key]):
                group.add(difference, LOGITS)
            groups.append(group)
    return groups


@torch.inference_mode()
def differences(model: Any, mode: str, expected: dict[str, Tensor], target: Tensor) -> list[float]:
    """The largest difference in each sequence's logits [length, vocab], where the mode reads."""
    clean = expected["clean_ids"] if "clean_ids" in expected else expected["input_ids"]
    ids = expected.get("noised_ids", clean)
    if "masked" in expected:
        ids = torch.where(expected["masked"].bool(), model.config.mask_token_id, clean)
    clean, ids = clean.view(-1, clean.shape[-1]), ids.view(-1, ids.shape[-1])
    target = target.view(*ids.shape, -1)
    batch, length = ids.shape
    match = re.fullmatch(r"(\w+?)(?:_block)?_(\d+)", mode)
    kind, block = (match[1], int(match[2])) if match else ("full", 0)
    if kind == "bd3lm":
        mask = block_diffusion_batch(torch.ones_like(ids, dtype=torch.bool), block)
        both = torch.cat([ids, clean], dim=1)  # [x_t ; x_0]
        positions = torch.arange(length).repeat(batch, 2)
        logits = model(input_ids=both, attention_mask=mask, position_ids=positions).logits
        return (logits[:, :length] - target).abs().flatten(1).amax(1).tolist()
    attention = build(Variants, {"attention": {"type": kind} | ({"block": block} if match else {})})
    engine = TransformersEngine(model, attention.attention, TargetSpec(0, 1.0, (1.0,)))
    worst = []
    for noised, gold, logits in zip(ids, clean, target, strict=True):
        # Two copies of the sequence are read at the masked positions alone, one at all positions.
        two_copies = kind in ("x0_xt", "native")
        read = (noised != gold).nonzero()[:, 0] if two_copies else torch.arange(length)
        own = (gold if two_copies else noised)[read]
        request = Request(noised.int().numpy(), read.int().numpy(), own.int().numpy())
        states = engine.hidden_states([request])
        worst.append(float((states @ model.lm_head.weight.T - logits[read]).abs().max()))
    return worst


def sampler_groups(folder: Path) -> list[Group]:
    """Greedy block decoding, a batch of all prompts; keys sample/stepsS-blockB-newN.

    The reference counts blocks from the prompt's end, behind hidden padding that is no whole
    number of blocks; so here the padding is given as part of the prompt, and hidden.
    """
    groups = []
    for path in sorted(folder.glob("*/expected.safetensors")):
        expected = load_file(path)
        prompts = [expected[key].tolist() for key in sorted(expected) if key.startswith("prompt_")]
        for key in sorted(k for k in expected if k.startswith("sample/")):
            steps, block, new = (int(x) for x in re.findall(r"\d+", key))
            per_block = max(1, steps * block // new)
            config = SampleConfig(new_tokens=new, block=block, steps_per_block=per_block)
            ids, valid = pad_left(prompts, block, 93)
            rows = [Row(row, config) for row in ids.tolist()]
            decoding = Decoding(load(path.parent), REFERENCE_SPECIAL, config)
            decoding.join(rows)
            decoding._valid &= valid
            for _ in range(new // block):
                list(decoding.next_block())
            whole = torch.cat([ids, torch.tensor([row.made for row in rows])], dim=1)
            group = Group(f"{path.parent.name} {key.removeprefix('sample/')}")
            for wrong in (whole != expected[key]).float().mean(dim=1).tolist():
                group.add(wrong, 0.0)
            groups.append(group)
    return groups
