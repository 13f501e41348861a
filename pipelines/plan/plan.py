"""`tide plan` and `tide cache --dry-run`: what a run will cost, before anything is run.

Memory is that of the real code on tensors without content; bytes are those of a shard of random
rows; hours follow from FLOPs at a utilisation that you state, or from tokens a second that you
measured (`tide throughput`).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from pipelines.plan.memory import (
    Conversations,
    largest_batch,
    student_config,
    student_step,
    teacher_memory,
)
from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import meta_model
from shared.settings.config import CacheConfig, TrainConfig
from shared.system.errors import TideError
from student_train.training.preflight import settle_batch
from teacher_cache.run.costs import (
    Workload,
    assumed_workload,
    bytes_per_draw,
    in_bytes,
    sampled_workload,
    size_of,
)
from teacher_cache.run.open import open_or_begin
from teacher_cache.teachers.registry import TeacherEntry, find_teacher, known_shape

USABLE = 0.92  # of a card's memory, for the allocator's gaps and the driver
PARAMETER_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Card:
    """A GPU: bytes of memory, and its maker's peak of dense bfloat16 products in TFLOP/s."""

    name: str
    memory: int
    tflops: float


CARDS = {
    "h100": Card("H100 SXM", 80_000_000_000, 989),
    "h200": Card("H200", 141_000_000_000, 989),
    "a100": Card("A100 80 GB", 80_000_000_000, 312),
    "4090": Card("RTX 4090", 24_000_000_000, 165),
    "l40s": Card("L40S", 48_000_000_000, 362),
}


def find_card(name: str, tflops: float | None = None) -> Card:
    """The card of that name, with another peak if given. TideError where there is none."""
    if name.lower() not in CARDS:
        raise TideError(f"unknown GPU {name!r}", expected=f"one of {', '.join(CARDS)}")
    card = CARDS[name.lower()]
    return card if tflops is None else dataclasses.replace(card, tflops=tflops)


@dataclass(frozen=True)
class Prices:
    """What things cost, in any currency."""

    gpu_hour: float
    terabyte_month: float


@dataclass(frozen=True)
class Assumptions:
    """What is stated and not measured: the card, the share of its peak that is reached, the
    teacher's speed.
    """

    card: Card = CARDS["h100"]
    mfu: float = 0.35
    tokens_per_second: float | None = None
    prices: Prices | None = None

    def hours(self, flops: float) -> float:
        """GPU hours of so many FLOPs at the stated utilisation."""
        return flops / (self.card.tflops * 1e12 * self.mfu) / 3600

    @property
    def utilisation(self) -> str:
        return f"{self.card.tflops:,.0f} TFLOP/s at {self.mfu:.0%} utilisation (stated)"

    def fits(self, memory: dict[str, int]) -> str:
        """The peak in words, by what it holds."""
        total = sum(memory.values())
        verdict = "fits" if total <= USABLE * self.card.memory else "does not fit"
        parts = ", ".join(f"{kind} {in_bytes(size)}" for kind, size in memory.items() if size)
        return f"{in_bytes(total)} at its peak, {verdict} on an {self.card.name} ({parts})"


def plan_from_statement(
    config: CacheConfig,
    examples: int,
    tokens: int,
    response: float,
    given: Assumptions,
    train: TrainConfig | None = None,
) -> str:
    """A plan without checkpoint, tokenizers or data: sizes on record, means as the user states
    them.

    With `train` it has stage two too.
    """
    entry = find_teacher(config.teacher, config.teachers_file)
    raw = known_shape(entry) if config.model is None else None
    if raw is None:
        raw = open_checkpoint(resolve(config.model or entry.model), weights=False).config
    data = Conversations(tokens, response)
    load = assumed_workload(entry, config, examples, tokens, response)
    lines = stage_one_lines(config, entry, raw, load, data, given)
    if train is not None:
        lines += stage_two_lines(settle_batch(train, 1), config, examples, data, given)
    return "\n".join(lines)


def plan_from_data(config: CacheConfig, given: Assumptions) -> str:
    """Stage one from the checkpoint's config, the real tokenizers and the real data. Nothing is
    written.
    """
    plan = open_or_begin(config)
    load = sampled_workload(plan)
    response = min(1.0, 2 * load.masked / max(load.student_tokens, 1))
    data = Conversations(max(4, round(load.student_tokens)), max(response, 0.01))
    raw = plan.checkpoint.config
    return "\n".join(stage_one_lines(plan.config, plan.entry, raw, load, data, given))


def stage_one_lines(
    config: CacheConfig,
    entry: TeacherEntry,
    raw: dict[str, Any],
    load: Workload,
    data: Conversations,
    given: Assumptions,
) -> list[str]:
    """What the teacher takes: memory, bytes on disk, FLOPs, hours and money."""
    model = meta_model(entry.architecture, raw)
    size, vocabulary = size_of(model), int(model.config.vocab_size)
    memory = teacher_memory(config, entry, raw, data)
    if config.engine.quantization is not None:  # embedding and head keep their precision
        saved = PARAMETER_BYTES["bfloat16"] - PARAMETER_BYTES[config.engine.quantization]
        memory["weights"] -= round((size.parameters - 2 * size.head) * saved)

    draws = load.examples * config.noise.draws
    flops = size.flops(load, load.tokens / max(load.passes, 1e-9))  # of one draw of one example
    if given.tokens_per_second is None:
        hours, speed = given.hours(flops * draws), given.utilisation
    else:
        hours = draws * load.tokens / given.tokens_per_second / 3600
        speed = f"{given.tokens_per_second:,.0f} tokens/s (stated)"
    each = bytes_per_draw(load, config, vocabulary, not entry.student_tokens)
    lines = [
        f"stage one: {config.teacher}, {entry.architecture}, {size.parameters / 1e9:.2f} B "
        f"parameters, {(size.active + size.head) / 1e9:.2f} B met by a token that is read",
        f"  workload        {load.source}",
        f"  examples        {load.examples:,} × {config.noise.draws} draws",
        f"  a draw          {load.passes:.2f} passes, {load.tokens:,.0f} tokens, "
        f"{load.masked:,.0f} masked positions, {load.chunks:,.0f} chunks",
        f"  GPU memory      {given.fits(memory)}",
        f"  on disk         {in_bytes(each)} a draw, {each / max(load.masked, 1e-9):,.0f} bytes a "
        f"masked position, {in_bytes(each * draws)} in all "
        "(random logits do not compress: an upper bound)",
        f"  compute         {flops / 1e12:,.3g} TFLOP a draw, {flops * draws / 1e18:,.3g} EFLOP",
        f"  GPU hours       {hours:,.1f} at {speed}",
    ]
    prices = given.prices
    if prices is not None:
        disk = each * draws / 1e12 * prices.terabyte_month
        lines.append(
            f"  money           {hours * prices.gpu_hour:,.0f} for the GPUs, {disk:,.2f} a month "
            "for "
            f"disk ({prices.gpu_hour:g} a GPU hour, {prices.terabyte_month:g} a terabyte-month)"
        )
    return lines


def stage_two_lines(
    train: TrainConfig, config: CacheConfig, examples: int, data: Conversations, given: Assumptions
) -> list[str]:
    """What the student takes: memory, the largest batch, FLOPs, hours and money."""
    step = student_step(train, config, data, given.card.memory)
    most = largest_batch(step, train, config, data, given.card.memory, USABLE)
    batch = train.batch_size * train.accumulation
    steps = train.max_steps if train.max_steps > 0 else math.ceil(train.epochs * examples / batch)
    hours = given.hours(step.flops * steps)
    raw = student_config(train, config)
    layers = f"{raw['num_hidden_layers']} layers of {raw['hidden_size']}"
    lines = [
        f"stage two: a student of {layers}, {raw['model_type']}",
        f"  steps           {steps:,} of {train.accumulation} × {train.batch_size} draws",
        f"  GPU memory      {given.fits(step.memory)}; batch_size at most {most}",
        f"  compute         {step.flops / 1e12:,.3g} TFLOP a step, "
        f"{step.flops * steps / 1e18:,.3g} EFLOP",
        f"  GPU hours       {hours:,.1f} at {given.utilisation}",
    ]
    if given.prices is not None:
        lines.append(f"  money           {hours * given.prices.gpu_hour:,.0f} for the GPUs")
    return lines
