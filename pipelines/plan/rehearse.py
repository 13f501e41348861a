"""`tide rehearse`: what both stages need on a card, in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.plan import stage_one, stage_two
from pipelines.plan.cards import Card
from pipelines.plan.counting import Phases
from pipelines.plan.stage_two import StepPlan, largest_batch, step_kernels, step_memory
from pipelines.plan.work import Conversations
from shared.settings.config import CacheConfig, TrainConfig
from student_train.training.preflight import settle_batch
from teacher_cache.run.costs import in_bytes

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

    def hours(self, times: float) -> tuple[float, float]:
        """GPU hours of so many batches, or steps: as written, and compiled."""
        return self.seconds[0] * times / 3600, self.seconds[1] * times / 3600


def rehearse_one(
    config: CacheConfig, data: Conversations, card: Card
) -> tuple[Stage, stage_one.Pass]:
    """Stage one on a card."""
    found = stage_one.rehearse_pass(config, data)
    return _stage(found.memory, Phases.of(found.kernels, card, stage_one.COMPILED), {}), found


def rehearse_two(plan: StepPlan, card: Card) -> Stage:
    """Stage two on a card: a step of `accumulation` passes."""
    kernels, syncs = step_kernels(plan)
    return _stage(
        step_memory(plan),
        Phases.of(kernels, card, stage_two.COMPILED),
        syncs,
        plan.train.accumulation,
    )


def _stage(
    memory: Mapping[str, int], phases: Phases, syncs: Mapping[str, int], passes: int = 1
) -> Stage:
    plain, compiled = (
        (phases.seconds(way, passes), phases.share_of_peak(way, passes)) for way in (False, True)
    )
    return Stage(memory, phases, syncs, (plain[0], compiled[0]), (plain[1], compiled[1]))


def step_plan(train: TrainConfig, cache: CacheConfig, data: Conversations, card: Card) -> StepPlan:
    """A step of one process on a card."""
    return StepPlan(settle_batch(train, 1), cache, data, int(card.memory))


def describe_rehearsal(
    cache: CacheConfig,
    train: TrainConfig,
    data: Conversations,
    examples: int,
    cards: Sequence[Card],
) -> str:
    """Both stages on each card."""
    lines = [
        f"{cache.teacher}, conversations of {data.tokens:,} tokens, {data.response:.0%} of them answers"
    ]
    for card in cards:
        lines += [
            "",
            f"{card.name}, {card.memory / 1e9:.0f} GB",
            *_first(cache, data, examples, card),
        ]
        lines += ["", *_second(train, cache, data, examples, card)]
    lines += [
        "",
        "Counted on tensors without content; times by roofline "
        f"({cards[0].products:.0%} of the products' peak, {cards[0].copies:.0%} of the bandwidth, "
        f"{cards[0].launch * 1e6:.0f} µs to launch a kernel). No GPU has confirmed them.",
    ]
    return "\n".join(lines)


def summarise_rehearsal(
    cache: CacheConfig, train: TrainConfig, data: Conversations, examples: int, card: Card
) -> str:
    """Both stages on a card in two lines, for `tide plan`."""
    one, found = rehearse_one(cache, data, card)
    plan = step_plan(train, cache, data, card)
    two = rehearse_two(plan, card)
    first = one.hours(examples * cache.noise.draws / found.examples)[1]
    second = two.hours(_steps(plan.train, examples))[1]
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
    hours = stage.hours(draws / found.examples)
    return [
        f"stage one: a batch of {found.rows:,} rows",
        *_memory(stage, card),
        *_table(stage),
        f"  {examples:,} examples × {config.noise.draws} draws: {_hours(hours)}",
    ]


def _second(
    train: TrainConfig, cache: CacheConfig, data: Conversations, examples: int, card: Card
) -> list[str]:
    plan = step_plan(train, cache, data, card)
    stage = rehearse_two(plan, card)
    settled = plan.train
    steps = _steps(settled, examples)
    hours = stage.hours(steps)
    fits = largest_batch(plan, _USABLE * card.memory)
    small = dataclasses.replace(settled, gradient_checkpointing=True)
    more = largest_batch(dataclasses.replace(plan, train=small), _USABLE * card.memory)
    waits = [
        f"  waits for the GPU {count}× a pass at {line}" for line, count in stage.syncs.items()
    ]
    return [
        f"stage two: steps of {settled.accumulation} × {settled.batch_size} draws",
        *_memory(stage, card),
        f"  batch_size at most {fits}"
        + (f", with gradient_checkpointing {more}" if more > fits else ""),
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
        lines.append(
            f"  {name or 'before':16}{plain.flops / 1e12:8.2f}{kernels:>18}{moved:>18}{took:>18}"
        )
    before, after = stage.seconds
    lines.append(
        f"  with launches {before * 1e3:.1f} → {after * 1e3:.1f} ms; "
        f"{stage.share[0]:.1%} → {stage.share[1]:.1%} of the card's peak"
    )
    return lines
