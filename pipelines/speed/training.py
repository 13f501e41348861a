"""One training step of each objective from the cache, against CE alone and against a teacher in the loop."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from pipelines.plan.stage_two import StepPlan, make_batch, real_model
from pipelines.plan.work import Conversations
from pipelines.recipes.read import cache_config
from pipelines.speed.timing import side_by_side
from shared.diffusion.attention import full
from shared.models.loading import random_model
from shared.settings.config import CacheConfig, StudentConfig, TrainConfig
from shared.settings.objectives import (
    KL,
    Calm,
    Distillation,
    NoDistillation,
    ReverseCalm,
    ReverseKL,
    Tidal,
)
from student_train.batches.collate import TargetReader, counts_of
from student_train.batches.loader import BatchDataset
from student_train.batches.open_cache import OpenCache, open_cache
from student_train.losses.fused_head import LossSettings
from student_train.model.student import load_student
from student_train.training.step import train_on_loss
from teacher_cache.run.build import build_cache
from teacher_cache.run.costs import size_of

_BATCH = 8
_STUDENT = StudentConfig(hidden_size=256, layers=6, heads=4, kv_heads=2, intermediate_size=768)


def bench_training() -> Table:
    """The ratios as a table."""
    with tempfile.TemporaryDirectory(prefix="tide-bench-") as folder:
        caches = {}
        for teacher in ("tiny-cross", "tiny-shared"):
            out = Path(folder) / teacher
            changes = [
                "data.limit=64",
                "shard_examples=64",
                "noise.draws=1",
                'targets.signals=["topk","chunks"]',
            ]
            caches[teacher] = out
            build_cache(cache_config(teacher, None, changes, out=out))
        return _measure(caches)


def _measure(caches: dict[str, Path]) -> Table:
    title = f"Training steps, batch of {_BATCH}; every step runs the student forward and backward"
    table = Table("cache", "objective", "step ÷ step with CE only", title=title)
    variants: dict[str, list[Distillation]] = {
        "tiny-cross": [Calm(), ReverseCalm(), Calm(tidal=Tidal())],
        "tiny-shared": [KL(), ReverseKL(), KL(tidal=Tidal())],
    }
    for name, cache in caches.items():
        config = TrainConfig(cache=cache, batch_size=_BATCH, epochs=1.0)
        opened = open_cache(config)
        torch.manual_seed(0)
        model, _ = load_student(_STUDENT, cache, opened.manifest)
        train_on_loss(model, 32, TargetReader(opened.manifest, opened.layout))
        dataset = BatchDataset(opened, config)
        batch = dataset[0]

        def step(settings: Distillation, model: Any = model, batch: Any = batch) -> None:
            model.zero_grad()
            model(
                batch=batch, settings=LossSettings(settings, 1.0, counts_of(batch["counts"]), 0.5)
            )[0].backward()

        jobs: dict[str, Callable[[], object]] = {
            "CE only": lambda step=step: step(NoDistillation())
        }
        for settings in variants[name]:
            label = settings.type + (" + TIDAL" if getattr(settings, "tidal", None) else "")
            jobs[label] = lambda step=step, settings=settings: step(settings)
        if name == "tiny-shared":
            teacher = _teacher(model)
            ratio = size_of(teacher).active / size_of(model).active
            jobs[f"kl, a teacher {ratio:.1f} times as large in the loop"] = _online(
                step, batch, teacher
            )
        seconds = side_by_side(jobs)
        seconds["loading a batch, files and decoding included"] = _loading(opened, config)
        for label, value in seconds.items():
            table.add_row(name, label, f"{value / seconds['CE only']:.2f}")
    _at_a_real_vocabulary(table)
    return table


def _loading(opened: OpenCache, config: TrainConfig) -> float:
    """Seconds of a batch: a whole epoch, from files on, divided by its batches."""
    times = []
    for _ in range(3):
        data = BatchDataset(opened, config)
        started = time.perf_counter()
        for i in range(data.batches_in(0)):
            data[i]
        times.append((time.perf_counter() - started) / data.batches_in(0))
    return statistics.median(times)


def _at_a_real_vocabulary(table: Table) -> None:
    """The same at 151,936 tokens, on random rows: there the head weighs more."""
    ordinary = CacheConfig(teacher="tiny-shared")
    train = TrainConfig(batch_size=2, precision="float32", device="cpu", student=_STUDENT)
    plan = StepPlan(train, ordinary, Conversations(256, 2 / 3), None, on_gpu=False, rows=151_936)
    batch, model = make_batch(plan)[0], real_model(plan)

    def step(settings: Distillation) -> None:
        model.zero_grad()
        model(batch=batch, settings=LossSettings(settings, 1.0, counts_of(batch["counts"]), 0.5))[
            0
        ].backward()

    kinds: list[Distillation] = [
        NoDistillation(),
        KL(tidal=Tidal()),
        ReverseKL(),
        Calm(),
        ReverseCalm(),
    ]
    names = ["CE only", "kl + TIDAL", "reverse_kl", "calm", "reverse_calm"]
    seconds = side_by_side(
        {name: lambda kind=kind: step(kind) for name, kind in zip(names, kinds, strict=True)},
        rounds=3,
    )
    for name, value in seconds.items():
        table.add_row("151,936 tokens", name, f"{value / seconds['CE only']:.2f}")


def _teacher(student: Any) -> Any:
    """A random teacher about 13 times the student's size without embeddings, as 8B is to 0.6B."""
    config = {**student.config.to_dict(), "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
              "num_hidden_layers": 5, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64,
              "rope_theta": 10_000.0}  # fmt: skip
    config.pop("rope_parameters")
    return random_model("qwen3", config, torch.float32)


def _online(
    step: Callable[[Distillation], None], batch: dict[str, Tensor], teacher: Any
) -> Callable[[], object]:
    """A step that also runs the two CompDemo passes of `teacher`, as training without a cache would."""

    def job() -> None:
        with torch.inference_mode():
            for _ in range(2):
                hidden = teacher.model(
                    input_ids=batch["noised"], attention_mask=full(batch["valid"]), use_cache=False
                )
                F.log_softmax(
                    teacher.lm_head(hidden.last_hidden_state[batch["row"], batch["column"]]), dim=-1
                )
        step(KL())

    return job
