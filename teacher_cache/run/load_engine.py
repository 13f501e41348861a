"""The engine that a plan names, with the teacher loaded."""

from __future__ import annotations

import torch

from shared.models.loading import load_model
from shared.settings.config import EngineConfig
from shared.system.hardware import choose_device, torch_dtype
from teacher_cache.engines.base import Engine
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.run.plan import CachePlan


def load_engine(plan: CachePlan) -> Engine:
    """The engine that the configuration names, with the teacher loaded, and the classes of the plan's tables."""
    engine = _vllm(plan) if plan.config.engine.type == "vllm" else _transformers(plan)
    if plan.vocabulary is not None:
        engine.use_classes(plan.vocabulary.class_of)
    return engine


def _vllm(plan: CachePlan) -> Engine:
    from teacher_cache.engines.vllm_engine.engine import VllmEngine

    return VllmEngine(
        plan.checkpoint,
        plan.entry,
        plan.target_spec(),
        plan.config.engine,
        plan.longest_pass,
        plan.shared_ids(),
    )


def _transformers(plan: CachePlan) -> Engine:
    settings = plan.config.engine
    device = choose_device(settings.device)
    model = load_model(
        plan.checkpoint,
        plan.entry.architecture,
        torch_dtype(settings.dtype),
        device,
        device_map=settings.device_map,
        quantization=settings.quantization,
    )
    return TransformersEngine(
        model,
        plan.entry.attention,
        plan.target_spec(),
        shift=plan.entry.shift,
        tokens_per_batch=settings.tokens_per_batch,
        head_rows=settings.head_rows,
        shared_ids=plan.shared_ids(),
        compiled=compiles(settings, device),
    )


def compiles(settings: EngineConfig, device: torch.device) -> bool:
    """Whether the engine's layers are compiled: where that was left open, on CUDA, with all layers on one GPU."""
    if settings.compile != "auto":
        return settings.compile == "on"
    return device.type == "cuda" and settings.device_map is None and settings.quantization is None
