"""The engine that a run names, with the teacher loaded."""

import torch

from shared.models.loading import load_model
from shared.settings.config import EngineConfig
from shared.system.hardware import choose_device, torch_dtype
from teacher_cache.engines.base import Engine
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.run.open import Run


def load_engine(run: Run) -> Engine:
    """The run's engine, with the teacher, and the classes of the run's tables where it has them."""
    settings, spec = run.config.engine, run.target_spec()
    if settings.type == "vllm":
        from teacher_cache.engines.vllm_engine.engine import VllmEngine

        longest = run.config.lengths.teacher
        engine: Engine = VllmEngine(
            run.checkpoint, run.entry, spec, settings, longest, run.shared_ids()
        )
    else:
        device = choose_device(settings.device)
        model = load_model(
            run.checkpoint,
            run.entry.architecture,
            torch_dtype(settings.dtype),
            device,
            device_map=settings.device_map,
            quantization=settings.quantization,
        )
        engine = TransformersEngine(
            model,
            run.entry.attention,
            spec,
            shift=run.entry.shift,
            tokens_per_batch=settings.tokens_per_batch,
            head_rows=settings.head_rows,
            shared_ids=run.shared_ids(),
            compiled=compiles(settings, device),
        )
    if run.vocabulary is not None:
        engine.use_classes(run.vocabulary.class_of)
    return engine


def compiles(settings: EngineConfig, device: torch.device) -> bool:
    """Whether the engine's layers are compiled; where that is left open: on CUDA, with all layers
    on one GPU.
    """
    if settings.compile != "auto":
        return settings.compile == "on"
    return device.type == "cuda" and settings.device_map is None and settings.quantization is None
