"""Which engine runs a teacher, and on what device."""

from __future__ import annotations

import dataclasses

import torch

from shared.config import CacheConfig
from shared.errors import TideError
from shared.models.loading import load_model
from teacher_cache.engines.base import Engine
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.engines.vllm_engine.engine import why_not
from teacher_cache.plan import CachePlan
from teacher_cache.teachers.registry import find_teacher


def settle_engine(config: CacheConfig) -> CacheConfig:
    """`config` with `auto` decided. TideError where vLLM is asked for and cannot run the teacher."""
    settings = config.engine
    if settings.type == "transformers":
        if settings.tensor_parallel > 1:
            raise TideError(
                f"engine.tensor_parallel is {settings.tensor_parallel}, but the transformers engine has no such thing",
                fix="use --engine vllm, or spread the teacher with engine.device_map=auto",
            )
        return config
    problem = why_not(find_teacher(config.teacher, config.teachers_file), settings)
    if problem is not None and settings.type == "vllm":
        raise problem
    kind = "vllm" if problem is None else "transformers"
    return dataclasses.replace(config, engine=dataclasses.replace(settings, type=kind))


def choose_device(setting: str) -> str:
    """`auto` is this machine's accelerator, or the CPU where it has none."""
    if setting != "auto":
        return setting
    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"


def load_engine(plan: CachePlan) -> Engine:
    """The engine that the configuration names, with the teacher loaded."""
    settings = plan.config.engine
    if settings.type == "vllm":
        from teacher_cache.engines.vllm_engine.engine import VllmEngine

        return VllmEngine(
            plan.checkpoint, plan.entry, plan.target_spec(), settings, plan.longest_pass, plan.shared_ids()
        )
    model = load_model(
        plan.checkpoint,
        plan.entry.architecture,
        getattr(torch, settings.dtype),
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
