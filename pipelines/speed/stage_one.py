"""Stage one against the same forward passes alone, and the rows that the LM head runs for."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from rich.table import Table

from pipelines.recipes.read import cache_config
from pipelines.speed.timing import side_by_side
from shared.cache.shards import Unit
from shared.models.loading import load_model
from teacher_cache.engines.inputs import build_inputs
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.run.load_engine import load_engine
from teacher_cache.run.open import open_or_begin
from teacher_cache.run.work import prepare_unit
from teacher_cache.teachers.registry import Full


def bench_stage_one() -> Table:
    """The ratios as a table."""
    with tempfile.TemporaryDirectory(prefix="tide-bench-") as folder:
        return _measure(Path(folder))


def _measure(folder: Path) -> Table:
    changes = ["data.limit=64", "shard_examples=64", "noise.draws=1", "engine.dtype=float32"]
    config = cache_config("tiny-shared", None, changes, out=folder / "speed")
    plan = open_or_begin(config)
    engine = load_engine(plan)
    assert isinstance(engine, TransformersEngine)
    requests = prepare_unit(plan, Unit(0, 0), plan.data.between(0, 64)).requests
    read = sum(len(r.read) for r in requests)
    before = engine.forward_rows
    engine.score(requests)
    share = (engine.forward_rows - before) / read

    plain = load_model(plan.checkpoint, plan.entry.architecture, torch.float32)
    size = config.engine.tokens_per_batch // max(len(request.ids) for request in requests)
    order = sorted(requests, key=lambda request: -len(request.ids))
    batches = [build_inputs(Full(), order[i : i + size]) for i in range(0, len(order), size)]

    def everywhere() -> None:
        """Padded batches of like length, and the head at every position, as a model's own forward has it."""
        with torch.inference_mode():
            for inputs in batches:
                plain(input_ids=inputs.ids, attention_mask=inputs.mask)

    seconds = side_by_side(
        {"engine": lambda: engine.score(requests), "plain": everywhere}, rounds=3
    )
    table = Table(
        "stage one, transformers engine", "ratio", title=f"{len(requests)} passes, {read} rows read"
    )
    table.add_row("rows for which the LM head ran ÷ rows asked for", f"{share:.2f}")
    table.add_row(
        "batched plain forwards, full logits ÷ engine",
        f"{seconds['plain'] / seconds['engine']:.2f}",
    )
    return table
