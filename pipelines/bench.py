"""`make bench`: ratios measured side by side in one run. Absolute times are this machine's and are not compared.

Each pair is timed in alternation, several rounds, and the median is taken, so that a busy machine slows both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pipelines.bench_alignment import bench_alignment
from pipelines.recipes import cache_config
from shared.attention import full
from shared.config import StudentConfig
from shared.data import iter_examples
from shared.manifest import load_manifest
from shared.objectives import KL, Calm, Distillation, NoDistillation, ReverseCalm, ReverseKL, Tidal
from student_train.collate import counts_of, targets_of
from student_train.loader import BatchDataset
from student_train.objective import objective, total
from student_train.student import load_student, masked_logits
from teacher_cache.build import build_cache
from teacher_cache.comp_demo import draw_for, passes, teacher_view
from teacher_cache.engines.choose import load_engine
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.plan import make_plan
from teacher_cache.teachers.loading import load_model

_ROUNDS = 5


def side_by_side(jobs: dict[str, Callable[[], object]], rounds: int = _ROUNDS) -> dict[str, float]:
    """Median seconds of each job, all jobs in turn in every round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name, job in jobs.items():
            started = time.perf_counter()
            job()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def run_bench() -> None:
    """Print all tables."""
    Console().print(bench_alignment())
    with tempfile.TemporaryDirectory(prefix="tide-bench-") as folder:
        caches = {}
        for teacher in ("tiny-cross", "tiny-shared"):
            out = Path(folder) / teacher
            changes = ["data.limit=64", "shard_examples=64", "noise.draws=1", 'targets.signals=["topk","chunks"]']
            caches[teacher] = out
            build_cache(cache_config(teacher, None, changes, out=out))
        _bench_objectives(caches)
        _bench_head(Path(folder))


def _bench_objectives(caches: dict[str, Path]) -> None:
    """One training step of each objective from the cache, against CE alone and against an online teacher."""
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
    Console().print(table)


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


def _bench_head(folder: Path) -> None:
    """Stage one against the same forward passes alone; and rows for which the head ran against rows asked for."""
    changes = ["data.limit=64", "shard_examples=64", "noise.draws=1"]
    config = cache_config("tiny-shared", None, changes, out=folder / "speed")
    plan = make_plan(config)
    engine = load_engine(plan)
    assert isinstance(engine, TransformersEngine)
    examples = plan.preparer()(list(iter_examples(config.data)))
    views = [teacher_view(e, draw_for(e, config.noise, 0)) for e in examples]
    requests = [r for view in views for r, _ in passes(view, plan.entry.mask_id, True)]
    read = sum(len(r.read) for r in requests)
    before = engine.forward_rows
    engine.score(requests)
    share = (engine.forward_rows - before) / read

    def everywhere() -> None:
        """The head at every position, as a model's own forward does."""
        for request in requests:
            ids = torch.from_numpy(request.ids).long()[None]
            with torch.inference_mode():
                engine._model(input_ids=ids, attention_mask=full(torch.ones_like(ids, dtype=torch.bool)))

    seconds = side_by_side({"engine": lambda: engine.score(requests), "plain": everywhere}, rounds=3)
    table = Table("stage one, transformers engine", "ratio", title=f"{len(requests)} passes, {read} rows read")
    table.add_row("rows for which the LM head ran ÷ rows asked for", f"{share:.2f}")
    table.add_row("one plain forward a pass, full logits ÷ engine", f"{seconds['plain'] / seconds['engine']:.2f}")
    Console().print(table)
