"""Whole training steps: step/step.json, and for each case its rows, masks and all gradients of the student.

The product's own objects do the work: teacher passes by the transformers engine, targets at k = V, collation, the
student's forward, LM head and loss in slices. Then once more with the targets written to a shard and read back.

Two things are the reference's alone, and are allowed for by name: its denoising weight is 1/(t + 1e-6), and it clamps
the student's chunk probability to [1e-7, 1 − 1e-7], so that forward CALM has no gradient where the student is most
wrong. The first is put into t; chunks at the clamp are taken out of the loss and their constant is added to its value.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.conformance.result import Group, absent, known_architecture, load_tensors
from shared.aligned.examples import Prepared
from shared.cache.manifest import Manifest
from shared.cache.row import CacheRow, Layout
from shared.cache.shards import read_shard, write_shard
from shared.cache.vocabulary import Vocabulary
from shared.diffusion.noise import Draw
from shared.models.checkpoint import Checkpoint, open_checkpoint
from shared.models.loading import load_model
from shared.settings.build import build
from shared.settings.objectives import KL, Calm, Distillation, NoDistillation, ReverseKL
from shared.settings.variants import strict
from shared.system.errors import TideError
from student_train.batches.collate import Batch, TargetReader, collate, counts_of
from student_train.losses import calm, tidal
from student_train.losses.fused_head import LossSettings
from student_train.losses.objective import parts_of
from student_train.model.student import student_architecture
from student_train.training.step import train_on_loss
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.method.comp_demo import passes, teacher_view
from teacher_cache.method.targets import TargetSpec
from teacher_cache.run.work import RowSettings, cache_row, merge_passes
from teacher_cache.teachers.registry import Attention, BlockCausal, Full, Native, X0Xt

_RELATIVE, _ANGLE = 1e-4, 1e-6
_TIME = 1e-6
"""What the reference adds to t in its weight."""


@strict
class _Objective:
    distillation: Distillation


@dataclass(frozen=True)
class _Case:
    """A case of step.json with its tensors."""

    folder: Path
    name: str
    about: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def distillation(self) -> Distillation:
        """The objective."""
        return build(
            _Objective, {"distillation": self.about["distillation"]}, f"{self.name} in step.json"
        ).distillation

    @property
    def shared(self) -> bool:
        """Whether the teacher reads the student's ids."""
        return "teacher_ids" not in self.tensors

    def lists(self, name: str) -> list[np.ndarray]:
        """A flat list, row by row."""
        ends = np.cumsum(self.tensors[f"{name}_sizes"].numpy())[:-1]
        return np.split(self.tensors[name].numpy().astype(np.int32), ends)


def step_groups(folder: Path) -> list[Group]:
    """One group a case: CE, distillation and loss, norm and angle of the gradient, in memory and through a shard."""
    path = folder / "step" / "step.json"
    if not path.exists():
        return absent("step/step.json")
    try:
        cases = json.loads(path.read_text())
        return [_check(_Case(path.parent, name, about, load_tensors(path.parent / f"{name}.safetensors")))
                for name, about in cases.items()]  # fmt: skip
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise TideError(f"{path} has another layout: {error!r}") from error


def _check(case: _Case) -> Group:
    group = Group(case.name)
    rows, manifest, layout = _rows(case)
    with tempfile.TemporaryDirectory(prefix="tide-step-") as scratch:
        shard = Path(scratch) / "part.parquet"
        write_shard(shard, rows, layout, {})
        for found in (rows, read_shard(shard, layout)):
            step = _Step(case, found, manifest, layout)
            for name, value in step.values().items():
                group.add(abs(value - case.about[name]) / abs(case.about[name]), _RELATIVE)
            norms, angle = step.gradient_error()
            group.add(norms, _RELATIVE)
            group.add(angle, _ANGLE)
            group.note = "the reference's clamp is active: put back" if step.clamped else group.note
    return group


def _rows(case: _Case) -> tuple[list[CacheRow], Manifest, Layout]:
    """What stage one makes of the case: the injected draws, the teacher's passes, the rows."""
    checkpoint, distillation = (
        open_checkpoint(str(case.folder / case.about["teacher"])),
        case.distillation,
    )
    model = load_model(checkpoint, _architecture(checkpoint), torch.float32)
    temperatures = tuple(sorted({1.0, getattr(distillation, "temperature", 1.0)}))
    size = int(model.config.vocab_size)
    over_tokens = isinstance(distillation, KL | ReverseKL)
    spec = TargetSpec(size if over_tokens else 0, 1.0, temperatures)
    engine = TransformersEngine(model, _attention(case), spec)
    examples = [_example(case, i) for i in range(len(case.tensors["t"]))]
    about = RowSettings(("topk",) if over_tokens else ("chunks",), case.about["comp_demo"])
    rows = []
    for example, draw in examples:
        view = teacher_view(example, draw)
        pairs = passes(view, case.about["teacher_mask_id"], about.comp_demo)
        scores = engine.score([request for request, _ in pairs])
        merged = merge_passes(spec, view.positions.size, scores, [rows_ for _, rows_ in pairs])
        rows.append(cache_row(example, draw, 0, view, merged, about))
    none = np.zeros(size, np.int32)
    vocabulary = Vocabulary(
        none, np.arange(size, dtype=np.int32), np.full((len(temperatures), size), 1 / size, "f4")
    )
    return rows, _manifest(case, about, temperatures), Layout(temperatures, "float32", vocabulary)


def _example(case: _Case, i: int) -> tuple[Prepared, Draw]:
    """Row `i` as prepared data and a draw. TideError where its positions are not those of its chunks."""
    ids, masked, in_a = (case.lists(name)[i] for name in ("student_ids", "masked", "in_a"))
    spans = np.array([[int(case.tensors["prompt_length"][i]), len(ids)]], np.int32)
    t, zero = float(case.tensors["t"][i].double() + _TIME), np.zeros(1, np.int32)
    if case.shared:
        chunks = np.zeros((0, 4), np.int32)
        return (Prepared(str(i), ids, spans, None, chunks, True, zero),
                Draw(t, masked, np.zeros(0, np.int32), in_a.astype(bool)))  # fmt: skip
    teacher, own = (
        case.lists(f"chunk_{side}")[i].reshape(-1, 2) for side in ("teacher", "student")
    )
    places = np.concatenate([np.arange(a, b) for a, b in teacher] or [zero[:0]])
    if not np.array_equal(places, case.lists("teacher_masked")[i]):
        raise TideError(f"{case.name}: teacher_masked of row {i} is not what its chunks cover")
    split = in_a[np.searchsorted(places, teacher[:, 0])].astype(bool)
    example = Prepared(
        str(i),
        ids,
        spans,
        case.lists("teacher_ids")[i],
        np.concatenate([teacher, own], 1),
        False,
        zero,
    )
    return example, Draw(t, masked, np.arange(len(own), dtype=np.int32), split)


def _manifest(case: _Case, about: RowSettings, temperatures: Sequence[float]) -> Manifest:
    fingerprint = {
        "targets": {
            "signals": list(about.signals),
            "temperatures": list(temperatures),
            "tail": "prior",
        },
        "teacher": {"student_tokens": case.shared},
        "student": {"mask_id": case.about["student_mask_id"]},
        "lengths": {"block": case.about["block"]},
    }
    return Manifest(fingerprint, 1, 1, len(case.tensors["t"]))


class _Step:
    """Stage two on the case's rows: one forward and one backward of the student."""

    def __init__(
        self, case: _Case, rows: list[CacheRow], manifest: Manifest, layout: Layout
    ) -> None:
        self._case, self._distillation = case, case.distillation
        checkpoint = open_checkpoint(str(case.folder / case.about["student"]))
        self._model: Any = load_model(checkpoint, student_architecture(checkpoint), torch.float32)
        self._model.requires_grad_(True)
        batch = collate(rows, manifest)
        self._settings = LossSettings(
            self._distillation,
            case.about["weight"],
            counts_of(batch["counts"]),
            case.about["step"] / case.about["max_steps"],
        )
        train_on_loss(self._model, case.about["block"], TargetReader(manifest, layout))
        constant, self.clamped = self._take_out_clamped(batch)
        loss, self._sums = self._model(batch=batch, settings=self._settings)
        loss.backward()
        self._constant = constant / float(self._settings.counts.chunks.clamp_min(1))

    def _take_out_clamped(self, batch: Batch) -> tuple[float, int]:
        """Forward CALM's chunks at the reference's clamp leave the batch; the sum of their terms, and their number."""
        if not isinstance(self._distillation, Calm):
            return 0.0, 0
        with torch.no_grad():
            logp = calm.token_log_likelihood(self._model(batch=batch).float(), batch["gold"])
        count, temperature = len(batch["chunk_logp"]), self._distillation.temperature
        p = (
            calm.chunk_log_likelihood(logp, batch["chunk_rows"], batch["chunk_of"], count)
            / temperature
        ).exp()
        outside = (p < calm.TEACHER_BOUND) | (p > 1 - calm.TEACHER_BOUND)
        if not outside.any():
            return 0.0, 0
        bounded = calm.bound_probability(p[outside])
        target = calm.bound_probability((batch["chunk_logp"][outside] / temperature).exp())
        weight, t, settings = (
            torch.ones_like(target),
            batch["chunk_t"][outside],
            self._distillation.tidal,
        )
        if settings is not None:
            train = tidal.training_strength(settings, self._settings.progress)
            strength = tidal.strength_at(settings, train, t)
            target = tidal.tidal_probability(bounded, target, strength)
            weight = tidal.timestep_weight(settings.timestep_weight, t)
        terms, kept = weight * calm.calm(bounded.log(), target), ~outside
        tokens = kept[batch["chunk_of"]]
        number = torch.cumsum(kept, 0) - 1
        batch["chunk_rows"], batch["chunk_of"] = (
            batch["chunk_rows"][tokens],
            number[batch["chunk_of"][tokens]],
        )
        batch["chunk_host"] = torch.stack([batch["chunk_rows"], batch["chunk_of"]]).numpy()
        batch["chunk_logp"], batch["chunk_t"] = batch["chunk_logp"][kept], batch["chunk_t"][kept]
        return float(terms.sum()), int(outside.sum())

    def values(self) -> dict[str, float]:
        """By the names of step.json."""
        ce, extra = (
            float(x) for x in parts_of(self._sums, self._settings.counts, self._distillation)
        )
        extra = 0.0 if isinstance(self._distillation, NoDistillation) else extra + self._constant
        return {"ce": ce, "distillation_value": extra, "loss": ce + self._settings.weight * extra}

    def gradient_error(self) -> tuple[float, float]:
        """How far the norm of the gradient of all parameters is off, and 1 − cosine."""
        own = {name: p.grad for name, p in self._model.named_parameters() if p.grad is not None}
        names = sorted(
            key.removeprefix("grad/") for key in self._case.tensors if key.startswith("grad/")
        )
        if sorted(own) != names:
            raise TideError(
                f"{self._case.name}: gradients of {sorted(set(own) ^ set(names))} are on one side alone"
            )
        ours = _flat([own[name] for name in names])
        theirs = _flat([self._case.tensors[f"grad/{name}"] for name in names])
        cosine = torch.dot(ours, theirs) / (ours.norm() * theirs.norm())
        return float((ours.norm() / theirs.norm() - 1).abs()), float(1 - cosine)


def _flat(tensors: Sequence[Tensor]) -> Float[Tensor, " numbers"]:
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def _architecture(checkpoint: Checkpoint) -> str:
    known = known_architecture(checkpoint)
    if known is None:
        kind = checkpoint.config.get("model_type")
        raise TideError(
            f"{checkpoint.folder} has a config of model_type {kind!r}",
            expected="a known architecture",
        )
    return known


def _attention(case: _Case) -> Attention:
    """From `full`, or `x0_xt, block 32`."""
    kind, _, block = str(case.about["teacher_attention"]).partition(", block ")
    blocks: dict[str, type[BlockCausal | X0Xt | Native]] = {
        "block_causal": BlockCausal, "x0_xt": X0Xt, "native": Native,
    }  # fmt: skip
    if kind == "full":
        return Full()
    if kind not in blocks or not block.isdecimal():
        raise TideError(
            f"{case.name}: unknown teacher_attention {case.about['teacher_attention']!r}"
        )
    return blocks[kind](int(block))
