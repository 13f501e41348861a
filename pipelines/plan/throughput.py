"""`tide throughput`: how fast a teacher runs on this machine, with random weights of its true shapes.

Speed and memory do not depend on the weights' values (a MoE's routing does, slightly: random weights spread tokens
evenly over the experts), so no checkpoint is needed to learn whether a card will do.
"""

from __future__ import annotations

import time

import numpy as np
import torch

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


def measure_throughput(
    config: CacheConfig, length: int, requests: int, rounds: int, tflops: float | None
) -> str:
    """Tokens a second, memory and (with the card's peak `tflops`) utilisation, in a few lines."""
    if length < 4 or requests < 1 or rounds < 1:
        raise TideError(
            "length, requests and rounds must be positive", expected="a length of 4 or more"
        )
    entry = find_teacher(config.teacher, config.teachers_file)
    raw = known_shape(entry) or open_checkpoint(resolve(config.model or entry.model)).config
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
    work = _requests(int(model.config.vocab_size), length, requests)
    engine.score(work[:2])
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        engine.score(work)
        seconds.append(time.perf_counter() - started)
    median = float(np.median(seconds))
    tokens = sum(pack.width for batch in engine.batches(work) for pack in batch)
    read = sum(len(request.read) for request in work)
    load = Workload(1, requests, tokens, read, length, 0, "")
    flops = size_of(model).flops(load, tokens / requests)
    share = (
        ""
        if tflops is None
        else f", {flops / median / (tflops * 1e12):.1%} of {tflops:,.0f} TFLOP/s"
    )
    on_gpu = device.type == "cuda"
    name = (
        torch.cuda.get_device_name(device)
        if on_gpu
        else f"{device} ({torch.get_num_threads()} threads)"
    )
    lines = [
        f"{config.teacher} with random weights in {precision} on {name}, built in {built:.1f} s",
        f"{requests} passes of {length} tokens, a quarter of them read, k {targets.k}; median of {rounds} rounds",
        f"{tokens / median:,.0f} tokens/s, {flops / median / 1e12:.2f} TFLOP/s{share}",
    ]
    if on_gpu:
        lines.append(f"peak memory {in_bytes(torch.cuda.max_memory_allocated(device))}")
    return "\n".join(lines)


def _requests(vocabulary: int, length: int, count: int) -> list[Request]:
    random = np.random.default_rng(0)
    made = []
    for _ in range(count):
        ids = random.integers(0, vocabulary, length, np.int32)
        read = np.sort(
            random.choice(np.arange(length // 2, length), length // 4, replace=False)
        ).astype(np.int32)
        made.append(Request(ids, read, ids[read]))
    return made
