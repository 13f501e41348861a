"""Engines side by side: vLLM's throughput relative to transformers on mixed lengths, and rows that the head ran for."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from safetensors.torch import save_file

from pipelines.speed.timing import side_by_side
from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model, random_model
from shared.settings.config import EngineConfig
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.engines.vllm_engine.engine import VllmEngine, installed
from teacher_cache.method.comp_demo import Request
from teacher_cache.method.targets import TargetSpec
from teacher_cache.teachers.registry import TeacherEntry

_LONGEST = 512
_REQUESTS = 128
_VOCABULARY = 32_000


def bench_engines() -> Table | str:
    """The ratios as a table, or what to do where vLLM is not installed."""
    if not installed():
        return "engines: vLLM is not installed here; after `make test-vllm`, `make bench` measures it too"
    with tempfile.TemporaryDirectory(prefix="tide-bench-engines-") as folder:
        return _measure(Path(folder))


def _checkpoint(folder: Path) -> None:
    """A random Llama of 35 million parameters."""
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(0)
    model = random_model("llama", config, torch.float32)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))


def _requests() -> list[Request]:
    """Lengths from 5 to 512, evenly; a quarter of each read."""
    random = np.random.default_rng(0)
    made = []
    for length in np.linspace(5, _LONGEST, _REQUESTS).astype(int):
        ids = random.integers(0, _VOCABULARY, length, np.int32)
        read = np.sort(random.choice(length, max(1, length // 4), replace=False)).astype(np.int32)
        made.append(Request(ids, read, ids[read]))
    random.shuffle(made)  # type: ignore[arg-type]
    return made


def _measure(folder: Path) -> Table:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
        "0"  # vLLM in this process, where its head's rows can be counted
    )
    _checkpoint(folder)
    checkpoint, requests, spec = (
        open_checkpoint(str(folder)),
        _requests(),
        TargetSpec(64, 1.0, (1.0, 2.0)),
    )
    entry = TeacherEntry(
        "x", "llama", mask_id=0, student_tokens=False, length=_LONGEST, student="x"
    )
    settings = EngineConfig(type="vllm", device="cpu", dtype="float32", tokens_per_batch=4096)
    with closing(VllmEngine(checkpoint, entry, spec, settings, _LONGEST)) as fast:
        from teacher_cache.engines.vllm_engine.models import ScorePooler

        model = load_model(checkpoint, "llama", torch.float32)
        plain = TransformersEngine(model, entry.attention, spec, tokens_per_batch=4096)
        seconds = side_by_side(
            {"vllm": lambda: fast.score(requests), "plain": lambda: plain.score(requests)}, 3
        )
        read = sum(len(request.read) for request in requests)
        before = ScorePooler.rows_run, plain.forward_rows
        fast.score(requests)
        plain.score(requests)
        shares = (ScorePooler.rows_run - before[0]) / read, (plain.forward_rows - before[1]) / read
    tokens = sum(len(request.ids) for request in requests)
    title = f"{len(requests)} passes of 5 to {_LONGEST} tokens, {tokens:,} in all, on the CPU"
    table = Table("engines, float32", "ratio", title=title)
    table.add_row("transformers' time ÷ vLLM's", f"{seconds['plain'] / seconds['vllm']:.2f}")
    table.add_row("vLLM: rows for which the LM head ran ÷ rows asked for", f"{shares[0]:.2f}")
    table.add_row("transformers: the same", f"{shares[1]:.2f}")
    return table
