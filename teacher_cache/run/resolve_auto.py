"""`auto` decided before anything runs: which engine, and in what precision.

A cache that exists keeps what it was begun with, on whatever machine it is gone on with.
"""

from __future__ import annotations

import dataclasses
import sys

from shared.cache.manifest import MANIFEST, load_manifest
from shared.settings.config import CacheConfig, EngineConfig
from shared.system.errors import TideError
from shared.system.hardware import choose_device, choose_precision, explain_precision
from teacher_cache.engines.vllm_engine.engine import why_not
from teacher_cache.run.ray_cluster import cluster_has_gpus
from teacher_cache.teachers.registry import find_teacher


def settle_engine(config: CacheConfig) -> CacheConfig:
    """`config` with every `auto` of its engine decided but the device's. TideError where the engine cannot run.

    The chosen precision is said on stderr where it was left open.
    """
    begun = (
        load_manifest(config.out).fingerprint.engine if (config.out / MANIFEST).exists() else None
    )
    settings = _settle_type(config, begun and begun.type)
    return dataclasses.replace(config, engine=_settle_dtype(settings, begun and begun.dtype))


def _settle_type(config: CacheConfig, begun: str | None) -> EngineConfig:
    settings = config.engine
    if settings.type == "auto" and begun is not None:
        settings = dataclasses.replace(settings, type=begun)
    if settings.type == "transformers":
        if settings.tensor_parallel > 1:
            raise TideError(
                f"engine.tensor_parallel is {settings.tensor_parallel}, but the transformers engine has no such thing",
                fix="use --engine vllm, or spread the teacher with engine.device_map=auto",
            )
        return settings
    problem = why_not(find_teacher(config.teacher, config.teachers_file), settings)
    if problem is not None and settings.type == "vllm":
        raise problem
    return dataclasses.replace(settings, type="vllm" if problem is None else "transformers")


def _settle_dtype(settings: EngineConfig, begun: str | None) -> EngineConfig:
    if (
        settings.workers == "ray"
        and settings.dtype == "auto"
        and begun is None
        and cluster_has_gpus()
    ):
        return dataclasses.replace(
            settings, dtype="bfloat16"
        )  # this machine only drives those that compute
    device = choose_device(settings.device)
    chosen = choose_precision(settings.dtype, device, begun)
    if settings.dtype == "auto":
        print(f"engine.dtype {explain_precision(chosen, device, begun)}", file=sys.stderr)
    return dataclasses.replace(settings, dtype=chosen)
