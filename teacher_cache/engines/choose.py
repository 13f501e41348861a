"""The engine that a plan names, with the teacher loaded."""

from __future__ import annotations

from shared.hardware import choose_device, torch_dtype
from shared.models.loading import load_model
from teacher_cache.engines.base import Engine
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.plan import CachePlan


def load_engine(plan: CachePlan) -> Engine:
    """The engine that the configuration names, with the teacher loaded, and the classes of the plan's tables."""
    engine = _vllm(plan) if plan.config.engine.type == "vllm" else _transformers(plan)
    if plan.vocabulary is not None:
        engine.use_classes(plan.vocabulary.class_of)
    return engine


def _vllm(plan: CachePlan) -> Engine:
    from teacher_cache.engines.vllm_engine.engine import VllmEngine

    return VllmEngine(
        plan.checkpoint, plan.entry, plan.target_spec(), plan.config.engine, plan.longest_pass, plan.shared_ids()
    )


def _transformers(plan: CachePlan) -> Engine:
    settings = plan.config.engine
    model = load_model(
        plan.checkpoint,
        plan.entry.architecture,
        torch_dtype(settings.dtype),
        choose_device(settings.device),
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
    )
