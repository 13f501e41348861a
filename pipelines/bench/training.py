"""One training step of each objective from the cache, against CE alone and against a teacher in the loop."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from pipelines.bench.timing import side_by_side
from pipelines.recipes import cache_config
from shared.attention import full
from shared.config import StudentConfig
from shared.manifest import load_manifest
from shared.objectives import KL, Calm, Distillation, NoDistillation, ReverseCalm, ReverseKL, Tidal
from student_train.collate import counts_of, targets_of
from student_train.loader import BatchDataset
from student_train.objective import objective, total
from student_train.student import load_student, masked_logits
from teacher_cache.build import build_cache
from teacher_cache.plan import make_plan
from teacher_cache.teachers.loading import load_model


def bench_training() -> Table:
    """The ratios as a table."""
    with tempfile.TemporaryDirectory(prefix="tide-bench-") as folder:
        caches = {}
        for teacher in ("tiny-cross", "tiny-shared"):
            out = Path(folder) / teacher
            changes = ["data.limit=64", "shard_examples=64", "noise.draws=1", 'targets.signals=["topk","chunks"]']
            caches[teacher] = out
            build_cache(cache_config(teacher, None, changes, out=out))
        return _measure(caches)


def _measure(caches: dict[str, Path]) -> Table:
    table = Table("cache", "objective", "step ÷ step with CE only", title="Training steps, batch of 16")
    variants: dict[str, list[Distillation]] = {
        "tiny-cross": [Calm(), ReverseCalm(), Calm(tidal=Tidal())],
        "tiny-shared": [KL(), ReverseKL(), KL(tidal=Tidal())],
    }
    for name, cache in caches.items():
        manifest = load_manifest(cache)
        torch.manual_seed(0)
        model, _ = load_student(StudentConfig(), cache, manifest)
        batch = BatchDataset(cache, manifest, batch_size=16, seed=0, epochs=1)[0]

        def step(settings: Distillation, model: Any = model, batch: Any = batch, manifest: Any = manifest) -> None:
            model.zero_grad()
            keys = ("noised", "clean", "valid", "row", "column")
            logits = masked_logits(model, *(batch[k] for k in keys), block=32)
            sums = objective(logits, targets_of(batch, manifest.temperatures), settings, 0.5)
            total(sums, counts_of(batch["counts"]), settings, 1.0).backward()

        jobs: dict[str, Callable[[], object]] = {"CE only": lambda step=step: step(NoDistillation())}
        for settings in variants[name]:
            label = settings.type + (" + TIDAL" if getattr(settings, "tidal", None) else "")
            jobs[label] = lambda step=step, settings=settings: step(settings)
        if name == "tiny-shared":
            jobs["kl, teacher online (two passes)"] = _online(step, batch, cache.with_name("online"))
        seconds = side_by_side(jobs)
        for label, value in seconds.items():
            table.add_row(name, label, f"{value / seconds['CE only']:.2f}")
    return table


def _online(step: Callable[[Distillation], None], batch: dict[str, Tensor], folder: Path) -> Callable[[], object]:
    """A step that also runs the teacher's two CompDemo passes, as training without a cache would."""
    plan = make_plan(cache_config("tiny-shared", None, [], out=folder))
    teacher: Any = load_model(plan.checkpoint, plan.entry.architecture, torch.float32)

    def job() -> None:
        with torch.inference_mode():
            for _ in range(2):
                hidden = teacher.model(input_ids=batch["noised"], attention_mask=full(batch["valid"]), use_cache=False)
                F.log_softmax(teacher.lm_head(hidden.last_hidden_state[batch["row"], batch["column"]]), dim=-1)
        step(KL())

    return job
