"""Passes of a teacher on tensors without content: the engine's own packs, model, head and top-k."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from pipelines.rehearsal.attention import rehearse_attention
from pipelines.rehearsal.counting import Counter, Kernel
from pipelines.rehearsal.memory import MemoryWatch
from pipelines.rehearsal.stage_two import no_content
from pipelines.rehearsal.work import Conversations, requests_of
from shared.config import CacheConfig
from shared.hardware import torch_dtype
from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import meta_model
from teacher_cache.comp_demo import Request
from teacher_cache.engines.batches import side_by_side
from teacher_cache.engines.packs import Pack
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.targets import TargetSpec
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


def rehearse_pass(config: CacheConfig, data: Conversations) -> Pass:
    """A batch of `engine.tokens_per_batch` rows. TideError where the teacher's sizes are neither here nor on record."""
    entry = find_teacher(config.teacher, config.teachers_file)
    raw = (known_shape(entry) if config.model is None else None) or open_checkpoint(
        resolve(config.model or entry.model)
    ).config
    vocabulary = int(meta_model(entry.architecture, raw).config.vocab_size)
    draws = config.noise.draws
    examples = max(1, -(-2 * config.engine.tokens_per_batch // data.tokens))
    requests = requests_of(data, examples, draws, config.noise.comp_demo, vocabulary)
    with no_content(), torch.no_grad():
        engine = _engine(config, entry, raw, vocabulary)
        packs = engine.batches(requests)[0]
        _attend(engine, entry, packs)
        watch = MemoryWatch(vocabulary)
        watch.hold("weights", [*engine._model.parameters(), *engine._model.buffers()])
        with watch:
            engine.readings(packs, requests)
        kernels = _count(engine, packs, requests)
    rows = sum(pack.width for pack in packs)
    passes = len(requests) / (examples * draws)
    return Pass(watch.peak, kernels, rows, sum(len(pack.members) for pack in packs) / passes)


def _engine(config: CacheConfig, entry: TeacherEntry, raw: dict[str, Any], vocabulary: int) -> TransformersEngine:
    model: Any = meta_model(entry.architecture, raw)
    dtype = torch_dtype("bfloat16" if config.engine.dtype == "auto" else config.engine.dtype)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        made = torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
        setattr(model.get_submodule(owner), leaf, made)
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(
            leaf, torch.empty(buffer.shape, dtype=buffer.dtype), persistent=False
        )
    model.tie_weights()
    targets = config.targets
    k = targets.k if "topk" in targets.signals and entry.student_tokens else 0
    spec = TargetSpec(k, targets.mass, targets.stored_temperatures)
    engine = TransformersEngine(
        model, entry.attention, spec, shift=entry.shift, tokens_per_batch=config.engine.tokens_per_batch,
        head_rows=config.engine.head_rows,
    )  # fmt: skip
    if k and targets.classes > 1:
        engine._spec = dataclasses.replace(spec, classes=targets.classes)
        engine._members = torch.empty(vocabulary, targets.classes)
    return engine


def _attend(engine: TransformersEngine, entry: TeacherEntry, packs: list[Pack]) -> None:
    """Attention by name; its cost by the pairs that see each other."""
    if isinstance(entry.attention, Full):
        pairs = sum(pack.width**2 for pack in packs)
    else:
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        with unset_fake_temporarily():
            pairs = sum(
                int(side_by_side([pack], torch.device("cpu")).arguments["attention_mask"].sum()) for pack in packs
            )
    rehearse_attention(engine._model, pairs)


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
