"""Rehearsed memory beside the memory of the very work with content, as a program of its own: the C library must give
freed memory back at once, which it is told before it starts. Prints JSON: name, rehearsed bytes, measured bytes.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

from pipelines.plan.stage_one import real_pass, rehearse_pass
from pipelines.plan.stage_two import StepPlan, real_step, step_memory
from pipelines.plan.work import Conversations
from pipelines.speed.memory import in_process
from shared.settings.config import (
    CacheConfig,
    EngineConfig,
    StudentConfig,
    TargetConfig,
    TrainConfig,
)
from shared.settings.objectives import KL, Distillation, NoDistillation, Tidal

SMALL = Conversations(32, 0.5)


def step(
    distillation: Distillation, batch: int, tokens: int, draws: int = 1, keep: bool = True
) -> StepPlan:
    """A step of a student that takes some hundred megabytes."""
    student = StudentConfig(hidden_size=512, layers=6, heads=8, kv_heads=4, intermediate_size=1536)
    train = TrainConfig(batch_size=batch, precision="float32", device="cpu", distillation=distillation,
                        draws_per_step=draws, gradient_checkpointing=not keep, student=student)  # fmt: skip
    return StepPlan(
        train, CacheConfig(teacher="tiny-shared"), Conversations(tokens, 2 / 3), None, on_gpu=False
    )


def warm_step(plan: StepPlan) -> Callable[[], None]:
    """A small step first, for what libraries keep once and for all."""
    student = dataclasses.replace(
        plan.train.student, layers=1, hidden_size=64, intermediate_size=64
    )
    train = dataclasses.replace(plan.train, batch_size=plan.train.draws_per_step, student=student)
    real_step(dataclasses.replace(plan, train=train, data=SMALL))()
    return real_step(plan)


def passes(folder: Path, width: int = 768, rows: int = 8192) -> CacheConfig:
    """Passes of a teacher; of 50 million weights where nothing else is said."""
    sizes = {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": width, "intermediate_size": 3 * width,
        "num_hidden_layers": 6, "num_attention_heads": 12, "num_key_value_heads": 6, "hidden_act": "silu",
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(sizes))
    return CacheConfig(teacher="tiny-shared", model=str(folder), targets=TargetConfig(classes=16),
                       engine=EngineConfig(dtype="float32", tokens_per_batch=rows))  # fmt: skip


def warm_pass(small: CacheConfig, config: CacheConfig, data: Conversations) -> Callable[[], None]:
    """A small pass of a small teacher first."""
    real_pass(small, SMALL)()
    return real_pass(config, data)


def main() -> None:
    """Argument: a folder to work in."""
    found = []
    plans = {
        "kl": step(KL(tidal=Tidal()), 4, 256),
        "two draws": step(KL(tidal=Tidal()), 8, 256, draws=2),
        "checkpointing": step(NoDistillation(), 8, 384, keep=False),
    }
    for name, plan in plans.items():
        found.append((name, sum(step_memory(plan).values()), in_process(warm_step, plan)))
    folder, data = Path(sys.argv[1]), Conversations(384, 2 / 3)
    small, config = passes(folder / "small", 48, 64), passes(folder / "teacher")
    found.append(("teacher", sum(rehearse_pass(config, data, on_gpu=False).memory.values()),
                  in_process(warm_pass, small, config, data)))  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
