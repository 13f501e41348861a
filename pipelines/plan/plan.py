"""Before anything is run: what a run will cost (`tide plan`, `tide cache --dry-run`), what a
teacher is (`tide teachers show`), how fast it is here (`tide throughput`).

Memory is that of the real code on tensors without content; bytes are those of a shard of random
rows; hours follow from FLOPs at a utilisation that you state, or from tokens a second that you
measured.
"""

import math
import timeit
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.filesize import decimal

from pipelines.plan import costs, memory
from pipelines.plan.costs import Workload
from pipelines.plan.memory import USABLE, Conversations
from shared.models.architectures import ARCHITECTURES
from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import meta_model, random_model
from shared.settings.config import CacheConfig, TrainConfig
from shared.system.hardware import choose_device, choose_precision, torch_dtype
from student_train.training.preflight import settle_batch
from teacher_cache.method import Request
from teacher_cache.run.open import open_or_begin
from teacher_cache.run.work import compiles
from teacher_cache.teachers.registry import TeacherEntry, find_teacher, known_shape

QUANTIZED_BYTES = {"int8": 1.0, "int4": 0.5}  # of a parameter, which has 2 in bfloat16


class Card(NamedTuple):
    name: str
    memory: int  # bytes
    tflops: float  # its maker's peak of dense bfloat16 products


CARDS = {
    "h100": Card("H100 SXM", 80_000_000_000, 989),
    "h200": Card("H200", 141_000_000_000, 989),
    "a100": Card("A100 80 GB", 80_000_000_000, 312),
    "4090": Card("RTX 4090", 24_000_000_000, 165),
    "l40s": Card("L40S", 48_000_000_000, 362),
}


@dataclass(frozen=True)
class Assumptions:
    """What is stated and not measured: the card, the share `mfu` of its peak that is reached, the
    teacher's speed, and prices in any currency; None leaves money out.
    """

    card: Card = CARDS["h100"]
    mfu: float = 0.35
    tokens_per_second: float | None = None
    gpu_hour: float | None = None
    terabyte_month: float = 0.0

    def hours(self, flops: float) -> float:
        """GPU hours of so many FLOPs at the stated utilisation."""
        return flops / (self.card.tflops * 1e12 * self.mfu) / 3600

    @property
    def utilisation(self) -> str:
        return f"{self.mfu:.0%} (stated) of an {self.card.name}'s {self.card.tflops:,.0f} TFLOP/s"

    def fits(self, held: dict[str, int], fix: str) -> str:
        """The peak in words, by what it holds. `fix`: what to set where it is too high."""
        total = sum(held.values())
        verdict = "fits" if total <= USABLE * self.card.memory else f"does not fit (set {fix})"
        parts = ", ".join(f"{kind} {decimal(size)}" for kind, size in held.items() if size)
        return f"{decimal(total)} at its peak, {verdict} on an {self.card.name} ({parts})"


def plan_from_statement(
    config: CacheConfig, examples: int, data: Conversations, given: Assumptions, train: TrainConfig
) -> str:
    """A plan of both stages from sizes on record and stated means."""
    entry = find_teacher(config.teacher, config.teachers_file)
    load = costs.assumed_workload(entry, config, examples, data.tokens, data.response)
    first = stage_one(config, teacher_config(config, entry), load, data, given)
    return f"{first}\n{stage_two(settle_batch(train, 1), config, examples, data, given)}"


def plan_from_data(config: CacheConfig, given: Assumptions) -> str:
    """Stage one from the checkpoint's config, real tokenizers and data. Nothing is written."""
    run = open_or_begin(config)
    load = costs.sampled_workload(run)
    response = min(1.0, 2 * load.masked / max(load.student_tokens, 1))
    data = Conversations(max(4, round(load.student_tokens)), max(response, 0.01))
    return stage_one(run.config, run.checkpoint.config, load, data, given)


def teacher_config(config: CacheConfig, entry: TeacherEntry) -> dict[str, Any]:
    """The teacher's config.json: on record, or of its checkpoint."""
    raw = known_shape(entry) if config.model is None else None
    return raw or open_checkpoint(resolve(config.model or entry.model), weights=False).config


def stage_one(
    config: CacheConfig, raw: Any, load: Workload, data: Conversations, given: Assumptions
) -> str:
    """What the teacher takes: memory, bytes on disk, FLOPs, hours and money."""
    entry = find_teacher(config.teacher, config.teachers_file)
    model = meta_model(entry.architecture, raw)
    size, vocabulary = costs.size_of(model), int(model.config.vocab_size)
    held = memory.teacher_memory(config, entry, raw, data)
    if config.engine.quantization is not None:  # embedding and head keep their precision
        saved = 2.0 - QUANTIZED_BYTES[config.engine.quantization]
        held["weights"] -= round((size.parameters - 2 * size.head) * saved)

    draws = load.examples * config.noise.draws
    flops = size.flops(load, load.tokens / max(load.passes, 1e-9))  # of one draw of one example
    hours, speed = given.hours(flops * draws), given.utilisation
    if given.tokens_per_second is not None:
        hours = draws * load.tokens / given.tokens_per_second / 3600
        speed = f"{given.tokens_per_second:,.0f} tokens/s (stated)"
    each = costs.bytes_per_draw(load, config, vocabulary, not entry.student_tokens)
    row, disk = decimal(round(each)), decimal(round(each * draws))
    rows = {
        "workload": load.source,
        "examples": f"{load.examples:,} × {config.noise.draws} draws",
        "a draw": f"{load.passes:.2f} passes, {load.tokens:,.0f} tokens, "
        f"{load.masked:,.0f} masked positions, {load.chunks:,.0f} chunks",
        "GPU memory": given.fits(held, "engine.device_map=auto, or quantization where it can be"),
        "on disk": f"{row} a draw, {each / max(load.masked, 1e-9):,.0f} bytes a masked "
        f"position, {disk} in all (random logits do not compress: an upper bound)",
        "compute": f"{flops / 1e12:,.3g} TFLOP a draw, {flops * draws / 1e18:,.3g} EFLOP",
        "GPU hours": f"{hours:,.1f} at {speed}",
    }
    if given.gpu_hour is not None:
        gpus, month = hours * given.gpu_hour, each * draws / 1e12 * given.terabyte_month
        prices = f"{given.gpu_hour:g} a GPU hour, {given.terabyte_month:g} a terabyte-month"
        rows["money"] = f"{gpus:,.0f} for the GPUs, {month:,.2f} a month for disk ({prices})"
    met = (size.active + size.head) / 1e9
    title = f"stage one: {config.teacher}, {entry.architecture}, {size.parameters / 1e9:.2f} B "
    return listed(f"{title}parameters, {met:.2f} B met by a token that is read", rows)


def stage_two(
    train: TrainConfig, config: CacheConfig, examples: int, data: Conversations, given: Assumptions
) -> str:
    """What the student takes: memory, the largest batch, FLOPs, hours and money."""
    card = given.card.memory
    asked, batch = train.batch_size, train.batch_size * train.accumulation
    times, train, held, flops = memory.fitted(train, config, data, card, USABLE * card, 1)
    cut = f" (of {asked}, halved by `tide train` too)" if times else ""
    cut += " with checkpointing" * train.gradient_checkpointing
    steps = train.max_steps if train.max_steps > 0 else math.ceil(train.epochs * examples / batch)
    hours = given.hours(flops * steps)
    rows = {
        "steps": f"{steps:,} of {train.accumulation} × {train.batch_size} draws{cut}",
        "GPU memory": given.fits(held, "optimizer=adamw_8bit, or parallel=fsdp on several"),
        "compute": f"{flops / 1e12:,.3g} TFLOP a step, {flops * steps / 1e18:,.3g} EFLOP",
        "GPU hours": f"{hours:,.1f} at {given.utilisation}",
    }
    if given.gpu_hour is not None:
        rows["money"] = f"{hours * given.gpu_hour:,.0f} for the GPUs"
    raw = memory.student_config(train, config)
    layers = f"{raw['num_hidden_layers']} layers of {raw['hidden_size']}"
    return listed(f"stage two: a student of {layers}, {raw['model_type']}", rows)


def listed(title: str, rows: dict[str, Any], width: int = 16) -> str:
    return "\n".join([title, *(f"  {name:<{width}}{value}" for name, value in rows.items())])


def describe_teacher(name: str, teachers_file: Path | None = None) -> str:
    """The entry of a teacher, and what loading it checks; TideError where it is unknown."""
    entry = find_teacher(name, teachers_file)
    rows = asdict(entry)
    about, architecture = rows.pop("about"), ARCHITECTURES[entry.architecture]
    pairs = [f"{old} → {new}" for old, new in architecture.renames.items()]
    rows["loads as"] = ("\n" + " " * 19).join([architecture.stock_class, *pairs])
    rows["weights"] = resolve(entry.model)
    family = "; of one family with the student's" if entry.student_tokens else ""
    checks = {
        "config.json": f"model_type is {' or '.join(architecture.model_types)}",
        "mask id": f"{entry.mask_id} in config.json (where it is given) and no ordinary token of "
        "the tokenizer",
        "tokenizer": f"no larger than the embedding; has a chat template{family}",
        "weights": "safetensors, whole; every tensor used once, every parameter filled, every "
        "shape as said",
        "positions": "lengths fit the model's own limit",
    }
    title = f"{name}: {about}".rstrip(": ")
    return listed(title, rows, 17) + "\n" + listed("loading checks:", checks, 17)


def measure_throughput(
    config: CacheConfig, length: int, requests: int, rounds: int, tflops: float | None
) -> str:
    """Tokens a second, memory and the share of the card's peak `tflops`. Weights are random: speed
    and memory do not depend on them, but that a MoE's routing spreads tokens evenly.
    """
    entry = find_teacher(config.teacher, config.teachers_file)
    device = choose_device(config.engine.device)
    precision = choose_precision(config.engine.dtype, device)
    raw = teacher_config(config, entry)
    torch.manual_seed(0)
    model = random_model(entry.architecture, raw, torch_dtype(precision), device)
    k, compiled = config.targets.k, compiles(config.engine, device)
    engine = memory.new_engine(model, config, entry, k, compiled)
    random, work = np.random.default_rng(0), []
    for _ in range(requests):
        ids = random.integers(0, int(model.config.vocab_size), length, np.int32)
        later_half = np.arange(length // 2, length, dtype=np.int32)
        read = np.sort(random.choice(later_half, length // 4, replace=False))
        work.append(Request(ids, read, ids[read]))
    engine.score(work[:2])
    median = float(np.median(timeit.repeat(lambda: engine.score(work), number=1, repeat=rounds)))
    tokens = sum(len(pack.ids) for batch in engine.batches(work) for pack in batch)
    load = Workload(1, requests, tokens, requests * (length // 4), length, 0, "")
    rate = costs.size_of(model).flops(load, tokens / requests) / median / 1e12  # TFLOP/s
    share = "" if tflops is None else f", {rate / tflops:.1%} of {tflops:,.0f} TFLOP/s"
    name, peak = f"{device} ({torch.get_num_threads()} threads)", ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = f"\npeak memory {decimal(torch.cuda.max_memory_allocated(device))}"
    return (
        f"{config.teacher} with random weights in {precision} on {name}\n"
        f"{requests} passes of {length} tokens, a quarter of them read, k {k}; "
        f"median of {rounds} rounds\n"
        f"{tokens / median:,.0f} tokens/s, {rate:.2f} TFLOP/s{share}{peak}"
    )
