"""Stage one from text to shards, against the bare forward passes that it needs."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from pipelines.recipes.read import cache_config
from pipelines.speed.timing import side_by_side
from shared.cache.shards import Unit
from shared.data import iter_examples
from shared.settings.config import CacheConfig, DataConfig
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.run.load_engine import load_engine
from teacher_cache.run.open import Run, open_or_begin
from teacher_cache.run.units import examples_of, run_units
from teacher_cache.run.work import prepare_unit

_EMBEDDED = Path(__file__).parents[2] / "teacher_cache" / "teachers" / "tiny"


def bench_end_to_end() -> Table:
    """Speed of the whole of stage one ÷ that of its forward passes alone, for two sizes of teacher."""
    table = Table("teacher", "parameters", "forward and head alone", "with top-k and logsumexp", "stage one",
                  title="speed, forward and head alone = 1")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="tide-bench-") as folder:
        for name, width, layers, examples in (
            ("embedded", 0, 0, 192),
            ("mid-size, random", 640, 12, 24),
        ):
            model = (
                _EMBEDDED if not width else _random_teacher(Path(folder) / "teacher", width, layers)
            )
            changes = [f"data.source={_chats(Path(folder), examples)}", f"shard_examples={examples // 6}",
                       "noise.draws=1"]  # fmt: skip
            config = cache_config(
                "tiny-shared", None, changes, model=str(model), out=Path(folder) / name
            )
            table.add_row(name, *_measure(config))
    return table


def _chats(folder: Path, examples: int) -> Path:
    """Functions of the standard library as a file, which is how users have their data."""
    path = folder / f"{examples}.jsonl"
    chats = itertools.islice(iter_examples(DataConfig("stdlib:train")), examples)
    lines = [json.dumps({"messages": list(c.messages)}) for c in chats]
    path.write_text("\n".join(lines) + "\n")
    return path


def _random_teacher(folder: Path, width: int, layers: int) -> Path:
    """A random Llama with the embedded teacher's tokenizer."""
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (_EMBEDDED / file).exists():
            shutil.copy(_EMBEDDED / file, folder / file)
    base = json.loads((_EMBEDDED / "config.json").read_text())
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "head_dim": 64,
             "num_attention_heads": width // 64, "num_key_value_heads": width // 64}  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**{**base, **sizes})).save_pretrained(folder)
    return folder


def _measure(config: CacheConfig) -> list[str]:
    plan = open_or_begin(config)
    engine = load_engine(plan)
    assert isinstance(engine, TransformersEngine)
    works = [prepare_unit(plan, unit, examples_of(plan, unit)) for unit in plan.missing]
    requests = [request for work in works for request in work.requests]

    def scores() -> None:
        for work in works:
            engine.score(work.requests)

    seconds = side_by_side(
        {
            "bare": _bare(plan, engine, requests),
            "scores": scores,
            "whole": lambda: _whole(plan, engine),
        },
        rounds=2,
    )
    parameters = sum(p.numel() for p in engine._model.parameters())
    shares = [f"{seconds['bare'] / seconds[name]:.2f}" for name in ("bare", "scores", "whole")]
    return [f"{parameters / 1e6:.0f} M", *shares]


def _bare(plan: Run, engine: TransformersEngine, requests: list) -> Callable[[], None]:
    """The same batches, built beforehand, through model and head; nothing is taken from the logits."""
    per_unit = len(requests) // 6
    made = []
    for start in range(0, len(requests), per_unit):  # batches never span shards
        made += [
            engine.batch(packs) for packs in engine.batches(requests[start : start + per_unit])
        ]

    @torch.inference_mode()
    def run() -> None:
        for batch in made:
            hidden = engine.hidden(batch)
            for start in range(0, len(hidden), plan.config.engine.head_rows):
                engine._model.lm_head(hidden[start : start + plan.config.engine.head_rows])

    return run


def _whole(plan: Run, engine: TransformersEngine) -> None:
    for path in plan.config.out.glob("draw=*/*.parquet"):
        path.unlink()
    units = [Unit(0, part) for part in range(plan.manifest.parts)]
    run_units(plan, engine, units)
