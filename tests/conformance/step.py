"""Whole training steps: step/step.json; of each case rows, masks and the student's gradients.

The product's own objects do the work: teacher passes by the transformers engine, targets at k = V,
collation, the student's forward, LM head and loss in slices. Then once more with the targets
written to a shard and read back.

Two things are the reference's alone: its denoising weight is 1/(t + 1e-6), and it clamps the
student's chunk probability to [1e-7, 1 − 1e-7], so that forward CALM has no gradient where the
student is most wrong. The first is put into t; chunks at the clamp are taken out of the loss and
their constant is added to its value.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipelines.plan.costs import even_layout, made_up_fingerprint
from shared.aligned.examples import Prepared
from shared.cache.manifest import Manifest
from shared.cache.shards import read_table, write_shard
from shared.diffusion import Draw
from shared.settings import config as options
from shared.settings.build import build
from student_train.batches.collate import Batch, TargetReader, collate, counts_of
from student_train.losses import divergence
from student_train.losses.divergence import strength_at, timestep_weight, training_strength
from student_train.losses.objective import LossSettings, parts_of
from student_train.model import train_on_loss
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.method import TargetSpec, passes, teacher_view
from teacher_cache.run.work import Item, cache_row, merge_passes
from tests.conformance.parts import Group, Variants, load

RELATIVE, ANGLE = 1e-4, 1e-6
TIME = 1e-6  # what the reference adds to t in its weight


def step_groups(folder: Path) -> list[Group]:
    """A group a case: CE, distillation, loss, norm and angle of the gradient."""
    cases = json.loads((folder / "step" / "step.json").read_text())
    return [check_case(folder / "step", name, case) for name, case in cases.items()]


def check_case(folder: Path, name: str, case: dict[str, Any]) -> Group:
    """Compare one case of step.json with the product's step."""
    tensors = load_file(folder / f"{name}.safetensors")
    kind, _, of_teacher = case["teacher_attention"].partition(", block ")
    attention = {"type": kind, "block": int(of_teacher)} if of_teacher else {"type": kind}
    settings = build(Variants, {"distillation": case["distillation"], "attention": attention})
    distillation = settings.distillation

    # 1. Stage one: the injected draws, the teacher's passes, the rows of the cache.
    teacher = load(folder / case["teacher"])
    over_tokens = isinstance(distillation, options.KL | options.ReverseKL)
    temperatures = tuple(sorted({1.0, distillation.temperature}))  # type: ignore[union-attr]
    size = int(teacher.config.vocab_size)
    spec = TargetSpec(size if over_tokens else 0, 1.0, temperatures)
    engine = TransformersEngine(teacher, settings.attention, spec)
    kept: Any = {"temperatures": temperatures, "rank": 1, "values": "float32"}
    targets = options.TargetConfig(("topk",) if over_tokens else ("chunks",), **kept)
    layout = even_layout(targets, size, int(teacher.config.hidden_size))
    if layout.tables is not None:
        spec = replace(spec, rank=1)
        engine.use_tables(layout.tables)
    comp_demo = case["comp_demo"]
    rows = []
    for example, draw in injected_draws(tensors):
        view = teacher_view(example, draw)
        pairs = passes(view, case["teacher_mask_id"], comp_demo)
        scores = engine.score([request for request, _ in pairs])
        item = Item(example, draw, view, [read for _, read in pairs])
        merged = merge_passes(spec, view.positions.size, scores, item.rows)
        rows.append(cache_row(item, 0, merged, targets.signals, comp_demo, False))
    block, mask_id = case["block"], case["student_mask_id"]
    config = options.CacheConfig(
        lengths=options.LengthConfig(student=block, block=block), targets=targets
    )
    fingerprint = made_up_fingerprint(config, "teacher_ids" not in tensors, mask_id + 1, mask_id)
    manifest = Manifest(fingerprint, 1, 1, len(rows))

    # 2. Stage two, on the rows as they are and as a shard has them.
    group = Group(name)
    expected = {k.removeprefix("grad/"): v for k, v in tensors.items() if k.startswith("grad/")}
    with tempfile.TemporaryDirectory(prefix="tide-step-") as scratch:
        shard = Path(scratch) / "part.parquet"
        write_shard(shard, rows, layout, {})
        read = read_table(shard, layout).rows(shard, layout)
    for batch in (collate(rows, manifest), collate(read, manifest)):
        model = load(folder / case["student"])
        model.requires_grad_(True)
        train_on_loss(model, block, TargetReader(layout, model.config.vocab_size))
        progress, constant = case["step"] / case["max_steps"], 0.0
        own = LossSettings(distillation, case["weight"], counts_of(batch["counts"]), progress)
        if isinstance(distillation, options.Calm):
            constant = take_out_clamped(model, batch, distillation, progress)
            group.note = "the reference's clamp is active: put back" if constant else ""
        loss, sums = model(batch=batch, settings=own)
        loss.backward()
        ce, distilled = (float(x) for x in parts_of(sums, own.counts, distillation))
        distilled += constant / float(own.counts.chunks.clamp_min(1))
        loss = ce + case["weight"] * distilled
        for key, value in (("ce", ce), ("distillation_value", distilled), ("loss", loss)):
            group.add(abs(value - case[key]) / abs(case[key]), RELATIVE)
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == expected.keys()
        ours = torch.cat([gradients[key].double().flatten() for key in expected])
        theirs = torch.cat([gradient.double().flatten() for gradient in expected.values()])
        cosine = torch.dot(ours, theirs) / (ours.norm() * theirs.norm())
        group.add(float((ours.norm() / theirs.norm() - 1).abs()), RELATIVE)
        group.add(float(1 - cosine), ANGLE)
    return group


def injected_draws(tensors: dict[str, Tensor]) -> Iterator[tuple[Prepared, Draw]]:
    """The rows of a case as prepared data, each with its draw."""
    lists = {}
    for name, values in tensors.items():
        if f"{name}_sizes" in tensors:  # flat, row by row
            ends = np.cumsum(tensors[f"{name}_sizes"].numpy())[:-1]
            lists[name] = np.split(values.numpy().astype(np.int32), ends)
    zero = np.zeros(1, np.int32)
    for i, ids in enumerate(lists["student_ids"]):
        masked, in_a = lists["masked"][i], lists["in_a"][i].astype(bool)
        spans = np.array([[int(tensors["prompt_length"][i]), len(ids)]], np.int32)
        t = float(tensors["t"][i].double() + TIME)
        if "teacher_ids" not in lists:
            none = np.zeros((0, 4), np.int32)
            example = Prepared(str(i), ids, spans, None, none, True, zero)
            yield example, Draw(t, masked, zero[:0], in_a)
            continue
        theirs = lists["chunk_teacher"][i].reshape(-1, 2)
        own = lists["chunk_student"][i].reshape(-1, 2)
        places = np.concatenate([np.arange(start, end) for start, end in theirs] or [zero[:0]])
        assert np.array_equal(places, lists["teacher_masked"][i])  # what the chunks cover
        chunks = np.concatenate([theirs, own], axis=1)
        split = in_a[np.searchsorted(places, theirs[:, 0])]
        example = Prepared(str(i), ids, spans, lists["teacher_ids"][i], chunks, False, zero)
        yield example, Draw(t, masked, np.arange(len(own), dtype=np.int32), split)


@torch.no_grad()
def take_out_clamped(model: Any, batch: Batch, settings: options.Calm, progress: float) -> float:
    """Take forward CALM's chunks at the reference's clamp out; the sum of their terms."""
    logp = divergence.token_log_likelihood(model(batch=batch).float(), batch["gold"])
    rows, chunk_of, teacher = batch["chunk_rows"], batch["chunk_of"], batch["chunk_logp"]
    student = divergence.chunk_log_likelihood(logp, rows, chunk_of, len(teacher))
    student = student / settings.temperature
    p = student.exp()
    outside = (p < divergence.TEACHER_BOUND) | (p > 1 - divergence.TEACHER_BOUND)
    bounded = divergence.bound_probability(p[outside])
    target = divergence.bound_probability((teacher[outside] / settings.temperature).exp())
    t = batch["chunk_t"][outside]
    weight = torch.ones_like(t)
    if settings.tidal is not None:
        mixed = strength_at(settings.tidal, training_strength(settings.tidal, progress), t)
        target = divergence.tidal_probability(bounded, target, mixed)
        weight = timestep_weight(settings.tidal.timestep_weight, t)
    kept = ~outside
    number = torch.cumsum(kept, 0) - 1  # of the chunks that stay
    tokens = kept[chunk_of]
    batch["chunk_rows"], batch["chunk_of"] = rows[tokens], number[chunk_of[tokens]]
    batch["chunk_host"] = torch.stack([batch["chunk_rows"], batch["chunk_of"]]).numpy()
    batch["chunk_logp"], batch["chunk_t"] = teacher[kept], batch["chunk_t"][kept]
    return float((weight * divergence.calm(bounded.log(), target)).sum())
