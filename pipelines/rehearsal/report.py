"""`tide rehearse`: what both stages need on a card, in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.rehearsal import stage_one, stage_two
from pipelines.rehearsal.cards import Card
from pipelines.rehearsal.counting import Cost, Phases
from pipelines.rehearsal.stage_two import StepPlan, largest_batch, step_kernels, step_memory
from pipelines.rehearsal.work import Conversations
from shared.config import CacheConfig, TrainConfig
from student_train.training.checks import settle_batch
from teacher_cache.costs import in_bytes

_USABLE = 0.92
"""Of a card's memory, for the allocator's gaps and the driver."""


@dataclass(frozen=True)
class Stage:
    """One stage on one card."""

    memory: Mapping[str, int]
    phases: Phases
    syncs: Mapping[str, int]
    seconds: tuple[float, float]
    """A batch, or a step: as written, and compiled."""
    share: tuple[float, float]
    """Of the card's peak."""

    @property
    def peak(self) -> int:
        """Bytes, at most."""
        return sum(self.memory.values())


def rehearse_one(config: CacheConfig, data: Conversations, card: Card) -> tuple[Stage, stage_one.Pass]:
    """Stage one on a card."""
    found = stage_one.rehearse_pass(config, data)
    phases = Phases.of(found.kernels, card, stage_one.COMPILED)
    seconds = (phases.step_seconds(False), phases.step_seconds(True))
    share = (phases.share_of_peak(False), phases.share_of_peak(True))
    return Stage(found.memory, phases, {}, seconds, share), found


def rehearse_two(plan: StepPlan, card: Card) -> Stage:
    """Stage two on a card: a step of `accumulation` passes."""
    kernels, syncs = step_kernels(plan)
    phases = Phases.of(kernels, card, stage_two.COMPILED)
    seconds, share = [], []
    for compiled in (False, True):
        parts = phases.compiled if compiled else phases.plain
        whole = sum(
            (part if name == "optimizer" else times(part, plan.train.accumulation) for name, part in parts.items()),
            Cost(0, 0.0, 0.0, 0.0),
        )
        seconds.append(whole.seconds + whole.kernels * card.launch)
        share.append(whole.flops / (seconds[-1] * card.tflops * 1e12))
    return Stage(step_memory(plan), phases, syncs, (seconds[0], seconds[1]), (share[0], share[1]))


def times(cost: Cost, number: int) -> Cost:
    """The same work several times."""
    return Cost(cost.kernels * number, cost.flops * number, cost.bytes * number, cost.seconds * number)


def step_plan(train: TrainConfig, cache: CacheConfig, data: Conversations, card: Card) -> StepPlan:
    """A step of one process on a card."""
    return StepPlan(settle_batch(train, 1), cache, data, int(card.memory))


def describe_rehearsal(
    cache: CacheConfig, train: TrainConfig, data: Conversations, examples: int, cards: Sequence[Card]
) -> str:
    """Both stages on each card."""
    lines = [f"{cache.teacher}, conversations of {data.tokens:,} tokens, {data.response:.0%} of them answers"]
    for card in cards:
        lines += ["", f"{card.name}, {card.memory / 1e9:.0f} GB", *_first(cache, data, examples, card)]
        lines += ["", *_second(train, cache, data, examples, card)]
    lines += [
        "",
        "Counted on tensors without content; times by roofline "
        f"({cards[0].products:.0%} of the products' peak, {cards[0].copies:.0%} of the bandwidth, "
        f"{cards[0].launch * 1e6:.0f} µs to launch a kernel). No GPU has confirmed them.",
    ]
    return "\n".join(lines)


def summarise_rehearsal(cache: CacheConfig, train: TrainConfig, data: Conversations, examples: int, card: Card) -> str:
    """Both stages on a card in two lines, for `tide plan`."""
    one, found = rehearse_one(cache, data, card)
    plan = step_plan(train, cache, data, card)
    two = rehearse_two(plan, card)
    first = one.seconds[1] / found.examples * examples * cache.noise.draws / 3600
    second = two.seconds[1] * _steps(plan.train, examples) / 3600
    return (
        f"rehearsed         stage one on an {card.name}: {in_bytes(one.peak)} at its peak, {first:,.1f} GPU hours\n"
        f"                  stage two: {in_bytes(two.peak)}, {second:,.1f} GPU hours (`tide rehearse` has the parts)"
    )


def _steps(train: TrainConfig, examples: int) -> int:
    """Optimizer steps of a run on one GPU."""
    batch = train.batch_size * train.accumulation
    return train.max_steps if train.max_steps > 0 else math.ceil(train.epochs * examples / batch)


def _first(config: CacheConfig, data: Conversations, examples: int, card: Card) -> list[str]:
    stage, found = rehearse_one(config, data, card)
    draws = examples * config.noise.draws
    hours = [seconds / found.examples * draws / 3600 for seconds in stage.seconds]
    return [
        f"stage one: a batch of {found.rows:,} rows",
        *_memory(stage, card),
        *_table(stage),
        f"  {examples:,} examples × {config.noise.draws} draws: {_hours(hours)}",
    ]


def _second(train: TrainConfig, cache: CacheConfig, data: Conversations, examples: int, card: Card) -> list[str]:
    plan = step_plan(train, cache, data, card)
    stage = rehearse_two(plan, card)
    settled = plan.train
    steps = _steps(settled, examples)
    hours = [seconds * steps / 3600 for seconds in stage.seconds]
    fits = largest_batch(plan, _USABLE * card.memory)
    small = dataclasses.replace(settled, gradient_checkpointing=True)
    more = largest_batch(dataclasses.replace(plan, train=small), _USABLE * card.memory)
    waits = [f"  waits for the GPU {count}× a pass at {line}" for line, count in stage.syncs.items()]
    return [
        f"stage two: steps of {settled.accumulation} × {settled.batch_size} draws",
        *_memory(stage, card),
        f"  batch_size at most {fits}" + (f", with gradient_checkpointing {more}" if more > fits else ""),
        *_table(stage),
        *(waits or ["  nothing in a step waits for the GPU"]),
        f"  {steps:,} steps: {_hours(hours)}",
    ]


def _hours(hours: Sequence[float]) -> str:
    return f"{hours[1]:,.1f} GPU hours ({hours[0]:,.1f} not compiled)"


def _memory(stage: Stage, card: Card) -> list[str]:
    parts = ", ".join(f"{name} {in_bytes(size)}" for name, size in stage.memory.items() if size)
    fits = "fits" if stage.peak <= _USABLE * card.memory else "does not fit"
    return [f"  memory {in_bytes(stage.peak)} at its peak: {fits} ({parts})"]


def _table(stage: Stage) -> list[str]:
    lines = [f"  {'':16}{'TFLOP':>8}{'kernels':>18}{'GB moved':>18}{'ms':>18}"]
    for name, plain in stage.phases.plain.items():
        if not plain.seconds:
            continue
        compiled = stage.phases.compiled[name]
        kernels = f"{plain.kernels:,} → {compiled.kernels:,}"
        moved = f"{plain.bytes / 1e9:.1f} → {compiled.bytes / 1e9:.1f}"
        took = f"{plain.seconds * 1e3:.1f} → {compiled.seconds * 1e3:.1f}"
        lines.append(f"  {name or 'before':16}{plain.flops / 1e12:8.2f}{kernels:>18}{moved:>18}{took:>18}")
    before, after = stage.seconds
    lines.append(
        f"  with launches {before * 1e3:.1f} → {after * 1e3:.1f} ms; "
        f"{stage.share[0]:.1%} → {stage.share[1]:.1%} of the card's peak"
    )
    return lines
