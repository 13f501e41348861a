"""A teacher before it is run: its entry in words (`tide teachers show`), its speed here (`tide
throughput`).
"""

import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from shared.models.architectures import ARCHITECTURES
from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import random_model
from shared.settings.config import CacheConfig
from shared.system.errors import TideError
from shared.system.hardware import choose_device, choose_precision, torch_dtype
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.method.comp_demo import Request
from teacher_cache.method.targets import TargetSpec
from teacher_cache.run.costs import Workload, in_bytes, size_of
from teacher_cache.run.load_engine import compiles
from teacher_cache.teachers.registry import find_teacher, known_shape


def describe_teacher(name: str, teachers_file: Path | None = None) -> str:
    """The entry of a teacher, and what loading it checks; TideError where it is unknown."""
    entry = find_teacher(name, teachers_file)
    lines = [f"{name}: {entry.about}".rstrip(": ")]
    lines += [f"  {key:<16} {value}" for key, value in asdict(entry).items() if key != "about"]
    kinds = "known"
    if (architecture := ARCHITECTURES.get(entry.architecture)) is not None:
        kinds = " or ".join(architecture.model_types)
        lines.append(f"  {'loads as':<16} {architecture.stock_class}")
        lines += [f"  {'':<16} {old} → {new}" for old, new in architecture.renames.items()]
    lines.append(f"  {'weights':<16} {resolve(entry.model)}")
    family = "; of one family with the student's" if entry.student_tokens else ""
    lines += [
        "loading checks:",
        f"  config.json      model_type is {kinds}",
        f"  mask id          {entry.mask_id} in config.json (where it is given) and no ordinary "
        "token of the tokenizer",
        f"  tokenizer        no larger than the embedding; has a chat template{family}",
        "  weights          safetensors, whole; every tensor used once, every parameter filled, "
        "every shape as said",
        "  positions        lengths fit the model's own limit",
    ]
    return "\n".join(lines)


def measure_throughput(
    config: CacheConfig, length: int, requests: int, rounds: int, tflops: float | None
) -> str:
    """Tokens a second, memory and (with the card's peak `tflops`) utilisation, in a few lines.

    Weights are random: speed and memory do not depend on their values, but that a MoE's routing
    spreads tokens evenly.
    """
    if length < 4:
        raise TideError(f"--length is {length}", expected="4 tokens or more")
    entry = find_teacher(config.teacher, config.teachers_file)
    raw = known_shape(entry) if config.model is None else None
    if raw is None:
        raw = open_checkpoint(resolve(config.model or entry.model), weights=False).config
    device = choose_device(config.engine.device)
    precision = choose_precision(config.engine.dtype, device)
    started = time.perf_counter()
    torch.manual_seed(0)
    model = random_model(entry.architecture, raw, torch_dtype(precision), device)
    built = time.perf_counter() - started
    targets = config.targets
    engine = TransformersEngine(
        model,
        entry.attention,
        TargetSpec(targets.k, targets.mass, targets.stored_temperatures),
        shift=entry.shift,
        tokens_per_batch=config.engine.tokens_per_batch,
        head_rows=config.engine.head_rows,
        compiled=compiles(config.engine, device),
    )
    random, work = np.random.default_rng(0), []
    for _ in range(requests):
        ids = random.integers(0, int(model.config.vocab_size), length, np.int32)
        later_half = np.arange(length // 2, length, dtype=np.int32)
        read = np.sort(random.choice(later_half, length // 4, replace=False))
        work.append(Request(ids, read, ids[read]))
    engine.score(work[:2])
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        engine.score(work)
        seconds.append(time.perf_counter() - started)
    median = float(np.median(seconds))
    tokens = sum(pack.width for batch in engine.batches(work) for pack in batch)
    read_tokens = sum(len(request.read) for request in work)
    load = Workload(1, requests, tokens, read_tokens, length, 0, "")
    rate = size_of(model).flops(load, tokens / requests) / median / 1e12  # TFLOP/s
    share = "" if tflops is None else f", {rate / tflops:.1%} of {tflops:,.0f} TFLOP/s"
    on_gpu = device.type == "cuda"
    threads = f"{device} ({torch.get_num_threads()} threads)"
    name = torch.cuda.get_device_name(device) if on_gpu else threads
    lines = [
        f"{config.teacher} with random weights in {precision} on {name}, built in {built:.1f} s",
        f"{requests} passes of {length} tokens, a quarter of them read, k {targets.k}; "
        f"median of {rounds} rounds",
        f"{tokens / median:,.0f} tokens/s, {rate:.2f} TFLOP/s{share}",
    ]
    if on_gpu:
        lines.append(f"peak memory {in_bytes(torch.cuda.max_memory_allocated(device))}")
    return "\n".join(lines)
