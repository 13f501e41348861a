"""Passes of a teacher on tensors without content: the engine's own packs, model, head and top-k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines.plan.attention import rehearse_attention
from pipelines.plan.content import fill, no_content
from pipelines.plan.counting import Counter, Kernel
from pipelines.plan.memory import MemoryWatch
from pipelines.plan.work import Conversations, requests_of
from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import meta_model
from shared.settings.config import CacheConfig
from shared.system.hardware import torch_dtype
from teacher_cache.engines.packs import Pack, lay_out, side_by_side
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.method.comp_demo import Request
from teacher_cache.method.targets import TargetSpec
from teacher_cache.teachers.registry import Full, TeacherEntry, find_teacher, known_shape

COMPILED = ("layers",)


@dataclass(frozen=True)
class Pass:
    """One full batch of the engine: its memory, its kernels, and how many passes of examples it holds."""

    memory: dict[str, int]
    """At its peak, by kind (`memory.KINDS`)."""
    kernels: list[Kernel]
    rows: int
    examples: float
    """Examples times draws."""


@dataclass(frozen=True)
class _Work:
    """What has content: the teacher's entry and sizes, requests for two batches or more."""

    config: CacheConfig
    entry: TeacherEntry
    raw: dict[str, Any]
    sizes: Any
    """The model's config, as transformers has it."""
    requests: list[Request]
    draws: int
    """Examples times draws."""

    @classmethod
    def of(cls, config: CacheConfig, data: Conversations) -> _Work:
        entry = find_teacher(config.teacher, config.teachers_file)
        known = known_shape(entry) if config.model is None else None
        raw = known or open_checkpoint(resolve(config.model or entry.model), weights=False).config
        sizes: Any = meta_model(entry.architecture, raw).config
        draws = config.noise.draws
        examples = max(1, -(-2 * config.engine.tokens_per_batch // data.tokens))
        requests = requests_of(
            data, examples, draws, config.noise.comp_demo, sizes.vocab_size, config.noise.demo_ratio
        )
        return cls(config, entry, raw, sizes, requests, examples * draws)

    def batches(self) -> list[list[Pack]]:
        """The requests as the engine lays them out."""
        budget = self.config.engine.tokens_per_batch
        return lay_out(self.entry.attention, self.requests, int(self.entry.shift), budget)

    def engine(self, on_gpu: bool) -> TransformersEngine:
        """The engine with a model of these sizes."""
        settings, targets = self.config.engine, self.config.targets
        dtype = torch_dtype(
            ("bfloat16" if on_gpu else "float32") if settings.dtype == "auto" else settings.dtype
        )
        k = targets.k if "topk" in targets.signals else 0
        spec = TargetSpec(k, targets.mass, targets.stored_temperatures)
        engine = TransformersEngine(
            fill(meta_model(self.entry.architecture, self.raw), dtype), self.entry.attention, spec,
            shift=self.entry.shift, tokens_per_batch=settings.tokens_per_batch, head_rows=settings.head_rows,
        )  # fmt: skip
        if k and targets.classes > 1:
            engine.use_classes(
                (np.arange(self.sizes.vocab_size) % targets.classes).astype(np.int32)
            )
        return engine


def rehearse_pass(config: CacheConfig, data: Conversations, on_gpu: bool = True) -> Pass:
    """A batch of `engine.tokens_per_batch` rows. TideError where the teacher's sizes are neither here nor on record."""
    work = _Work.of(config, data)
    batches = work.batches()
    first = batches[0]
    whole = sum(pack.width for batch in batches for pack in batch)
    pairs = _pairs(work.entry, first)
    with no_content(), torch.no_grad():
        engine = work.engine(on_gpu)
        if on_gpu:
            rehearse_attention(engine._model, pairs)
        watch = MemoryWatch(work.sizes.vocab_size)
        watch.hold("weights", [*engine._model.parameters(), *engine._model.buffers()])
        with watch:
            engine.readings(first, work.requests)
        kernels = _count(engine, first, work.requests)
    rows = sum(pack.width for pack in first)
    return Pass(watch.peak, kernels, rows, work.draws * rows / whole)


def real_pass(config: CacheConfig, data: Conversations) -> Callable[[], None]:
    """The very pass with content on this machine's CPU, to measure what it takes."""
    work = _Work.of(config, data)
    first = work.batches()[0]

    def run() -> None:
        with torch.no_grad():
            work.engine(on_gpu=False).readings(first, work.requests)

    return run


def _pairs(entry: TeacherEntry, packs: list[Pack]) -> int:
    """How many pairs of rows see each other."""
    if isinstance(entry.attention, Full):
        return sum(pack.width**2 for pack in packs)
    masks = (
        side_by_side([pack], torch.device("cpu")).arguments["attention_mask"] for pack in packs
    )
    return sum(int(mask.sum()) for mask in masks)


def _count(engine: TransformersEngine, packs: list[Pack], requests: list[Request]) -> list[Kernel]:
    counter = Counter()
    layers = engine._model.model.layers
    hooks = [
        layers[0].register_forward_pre_hook(lambda *_: counter.enter("layers")),
        layers[-1].register_forward_hook(lambda *_: counter.enter("head and top-k")),
    ]
    counter.enter("before")
    with counter:
        engine.readings(packs, requests)
    for hook in hooks:
        hook.remove()
    return counter.kernels
