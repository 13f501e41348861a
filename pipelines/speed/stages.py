"""Stage one and stage two side by side, an example: what the teacher costs once, and what it would
cost in every step.

The embedded teacher and the student of its recipe, functions of the standard library, one draw of
each.
"""

import tempfile
from pathlib import Path

import torch
from rich.table import Table

from pipelines.recipes.read import cache_config, train_config
from pipelines.speed.timing import side_by_side
from shared.cache.shards import Unit
from student_train.batches.collate import TargetReader, counts_of
from student_train.batches.loader import BatchDataset, OpenCache
from student_train.losses.objective import LossSettings
from student_train.model import load_student, train_on_loss
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.run.build import build_cache
from teacher_cache.run.open import open_or_begin
from teacher_cache.run.work import examples_of, load_engine, prepare_unit, run_units

EXAMPLES, BATCH, ROUNDS = 96, 8, 3


def bench_stages(examples: int = EXAMPLES) -> Table:
    """Time of an example ÷ its step of training from the cache."""
    with tempfile.TemporaryDirectory(prefix="tide-bench-") as folder:
        return _measure(Path(folder), examples)


def _measure(folder: Path, examples: int) -> Table:
    changes = [f"data.limit={examples}", f"shard_examples={examples // 4}", "noise.draws=1"]
    config = cache_config("tiny-shared", None, changes, out=folder / "cache")
    build_cache(config)
    plan = open_or_begin(config)
    engine = load_engine(plan)
    assert isinstance(engine, TransformersEngine)
    units = [Unit(0, part) for part in range(plan.manifest.parts)]
    requests = []
    for unit in units:
        requests += prepare_unit(plan, unit, examples_of(plan, unit)).requests
    batches = [engine.batch(packs) for packs in engine.batches(requests)]

    def whole() -> None:
        for path in plan.config.out.glob("draw=*/*.parquet"):
            path.unlink()
        run_units(plan, engine, units)

    @torch.inference_mode()
    def layers_alone() -> None:
        for batch in batches:
            engine.hidden(batch)

    train = train_config("tiny-shared", None, [f"batch_size={BATCH}"], cache=folder / "cache")
    opened = OpenCache(train)
    torch.manual_seed(0)
    model, _ = load_student(train.student, train.cache, opened.manifest)
    train_on_loss(model, plan.config.lengths.block, TargetReader(opened.manifest, opened.layout))
    data = BatchDataset(opened, train)

    def train_from_cache() -> None:
        for number in range(examples // BATCH):
            batch = data[number]
            counts = counts_of(batch["counts"])
            model.zero_grad()
            loss, _ = model(
                batch=batch, settings=LossSettings(train.distillation, train.weight, counts, 0.5)
            )
            loss.backward()

    def train_with_teacher() -> None:
        engine.score(requests)
        train_from_cache()

    def load_batches() -> None:
        for number in range(examples // BATCH):
            data[number]

    jobs = {
        "a step from the cache": train_from_cache,
        "of it, reading and collating": load_batches,
        "a step with the teacher in the loop": train_with_teacher,
        "stage one, from text to shards": whole,
        "of it, passes, head and top-k": lambda: engine.score(requests),
        "of it, layers alone": layers_alone,
    }
    seconds = side_by_side(jobs, ROUNDS)
    title = f"The embedded teacher and its student, {examples} examples, one draw"
    table = Table("an example", "÷ a step from the cache", title=title)
    for name, value in seconds.items():
        table.add_row(name, f"{value / seconds['a step from the cache']:.2f}")
    return table
