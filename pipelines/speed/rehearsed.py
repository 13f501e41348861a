"""What a rehearsal counts of both stages: kernels and bytes as written and compiled, and the roofline's shares."""

from __future__ import annotations

import dataclasses

from rich.table import Table

from pipelines.plan.cards import find_card
from pipelines.plan.rehearse import Stage, rehearse_one, rehearse_two, step_plan
from pipelines.plan.work import Conversations
from pipelines.recipes.read import cache_config, train_config

_DATA = Conversations(512, 2 / 3)


def bench_rehearsed() -> Table:
    """The counts as a table."""
    card = find_card("h100")
    title = "Counted on tensors without content: as written → compiled (no GPU has confirmed it)"
    table = Table(
        "what", "kernels", "GB moved", "ms", f"share of the {card.name}'s peak", title=title
    )

    def add(name: str, stage: Stage) -> None:
        plain, compiled = (stage.phases.total(way) for way in (False, True))
        table.add_row(
            name, f"{plain.kernels:,} → {compiled.kernels:,}", f"{plain.bytes / 1e9:.0f} → {compiled.bytes / 1e9:.0f}",
            f"{stage.seconds[0] * 1e3:.0f} → {stage.seconds[1] * 1e3:.0f}",
            f"{stage.share[0]:.1%} → {stage.share[1]:.1%}",
        )  # fmt: skip

    for teacher in ("llada-8b", "wedlm-8b", "llada2-mini"):
        add(
            f"stage one, {teacher}, a batch",
            rehearse_one(cache_config(teacher, None, []), _DATA, card)[0],
        )
    for teacher in ("llada-8b", "wedlm-8b"):
        caching, training = (
            cache_config(teacher, None, []),
            train_config(teacher, None, ["global_batch=64"]),
        )
        for draws in (1, 4):
            settings = dataclasses.replace(training, batch_size=16, draws_per_step=draws)
            name = (
                f"stage two, {teacher}, a step of 64, {draws} draw{'s' if draws > 1 else ''} a pass"
            )
            add(name, rehearse_two(step_plan(settings, caching, _DATA, card), card))
    return table
