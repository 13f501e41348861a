"""Memory and FLOPs of both stages without content, against sums that are known and torch's own
counts.
"""

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pipelines.plan import memory
from pipelines.plan.costs import even_layout
from pipelines.plan.plan import Assumptions, find_card, plan_from_statement
from pipelines.recipes.read import cache_config, train_config
from shared.models.loading import random_model
from shared.settings.config import (
    KL,
    CacheConfig,
    EngineConfig,
    NoDistillation,
    StudentConfig,
    Tidal,
    TrainConfig,
)
from shared.system.errors import TideError
from student_train.batches.collate import TargetReader, collate, counts_of
from student_train.losses.objective import LossSettings
from student_train.model import train_on_loss
from student_train.training.trainer import make_trainer
from teacher_cache.teachers.registry import find_teacher
from tests.student_train.training.test_trainer import config

GB = 10**9
DATA = memory.Conversations(128, 2 / 3)
CACHE = CacheConfig(teacher="tiny-shared")
STUDENT = StudentConfig(hidden_size=128, layers=3, heads=4, kv_heads=2, intermediate_size=256)
TRAIN = TrainConfig(batch_size=4, student=STUDENT, distillation=KL(tidal=Tidal()), accumulation=2)


def student_step(gpu_memory: int = GB, **changes: Any) -> tuple[dict[str, int], float]:
    return memory.student_step(dataclasses.replace(TRAIN, **changes), CACHE, DATA, gpu_memory)


def parameters(raw: dict[str, Any]) -> int:
    return random_model("qwen3", raw, torch.float32).num_parameters()


def test_a_step_holds_weights_gradients_and_state_and_grows_with_the_batch() -> None:
    held, flops = student_step()
    n = parameters(memory.student_config(TRAIN, CACHE))
    for kind, floats in (("weights", 1), ("gradients", 1), ("optimizer", 2)):
        assert held[kind] == pytest.approx(4 * floats * n, rel=0.01)
    most = memory.largest_batch(sum(held.values()), TRAIN, CACHE, DATA, GB, 0.9 * GB)
    at_most, _ = student_step(batch_size=most)
    assert sum(at_most.values()) == pytest.approx(0.9 * GB, rel=0.1)
    less, more_flops = student_step(gradient_checkpointing=True)
    assert less["activations"] < held["activations"] and more_flops > flops
    with pytest.raises(TideError):
        student_step(optimizer="adafactor")


def real_step(train: TrainConfig, device: str) -> Any:
    """The very step with content: its loss, and its model."""
    raw = memory.student_config(train, CACHE)
    rows, manifest = memory.student_rows(train, CACHE, DATA, raw["vocab_size"])
    model: Any = random_model("qwen3", raw, torch.float32, device).train()
    model.requires_grad_(True)
    layout = even_layout(CACHE.targets, raw["vocab_size"])
    train_on_loss(model, CACHE.lengths.block, TargetReader(manifest, layout))
    batch = collate(rows, manifest)
    counts = counts_of(batch["counts"])
    batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
    settings = LossSettings(train.distillation, 1.0, counts, 0.5)
    return lambda: model(batch=batch, settings=settings)[0], model


def test_flops_are_those_that_torch_counts() -> None:
    changes: dict[str, Any] = {"accumulation": 1, "distillation": NoDistillation()}
    loss, _ = real_step(dataclasses.replace(TRAIN, **changes), "cpu")
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    attention = 0.15  # torch does not count the CPU's kernel of it
    counted = counter.get_total_flops()
    assert counted <= student_step(**changes)[1] <= (1 + attention) * counted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_is_what_a_gpu_takes() -> None:
    changes: dict[str, Any] = {"batch_size": 64, "accumulation": 1, "precision": "bfloat16"}
    changes["student"] = StudentConfig("qwen3", 1024, 8, 16, 8, 3072)
    loss, model = real_step(dataclasses.replace(TRAIN, **changes), "cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    gc.collect()
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    card = torch.cuda.get_device_properties(0).total_memory
    predicted = sum(student_step(card, **changes)[0].values())
    print(predicted, torch.cuda.max_memory_allocated())
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


@pytest.mark.parametrize("attention", ["full", "x0_xt"])
def test_a_teachers_batch_holds_its_weights_and_grows_with_its_rows(attention: str) -> None:
    entry = find_teacher("llada-8b" if attention == "full" else "wedlm-8b-x0_xt")
    raw = memory.student_config(TRAIN, CACHE)
    held = []
    for tokens in (1024, 4096):
        engine = EngineConfig(dtype="float32", tokens_per_batch=tokens)
        entry = dataclasses.replace(entry, architecture="qwen3")
        held.append(memory.teacher_memory(CacheConfig(engine=engine), entry, raw, DATA))
    for kinds in held:
        assert kinds["weights"] == pytest.approx(4 * parameters(raw), rel=0.01)
        assert kinds["gradients"] == kinds["optimizer"] == 0
    assert held[1]["activations"] > 1.5 * held[0]["activations"]


class CountValues(TorchDispatchMode):
    """How often a value is asked of a tensor, for which a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        self.asked += func.overloadpacket in names
        return func(*args, **(kwargs or {}))


def test_no_step_of_training_waits(caches: dict[str, Path], tmp_path: Path) -> None:
    changes: dict[str, Any] = {"heldout": None, "log_steps": 50, "checkpoint_steps": 50}
    objectives = {
        "tiny-shared": {"type": "kl", "tidal": {}},
        "tiny-cross": {"type": "reverse_calm"},
    }
    for teacher, objective in objectives.items():
        asked = []
        for steps in (3, 8):
            out = tmp_path / f"{teacher}{steps}"
            run = config(caches[teacher], out, max_steps=steps, distillation=objective, **changes)
            trainer, _ = make_trainer(run)
            with CountValues() as values:
                trainer.train_resuming()
            asked.append(values.asked)
        assert asked[0] == asked[1]  # at the beginning, at the first log and at the end


def test_the_plan_has_both_stages_and_the_money_of_what_is_stated() -> None:
    caching = cache_config("tiny-shared", None, [])
    training = train_config("tiny-shared", None, ["batch_size=4"])
    given = Assumptions(find_card("4090", 100), 0.5, tokens_per_second=1000)
    text = plan_from_statement(caching, 1000, 128, 0.5, given, training)
    assert "stage one" in text and "stage two" in text and "batch_size at most" in text
    assert Assumptions(find_card("4090", 100), 0.5).hours(180e15) == pytest.approx(1)
    with pytest.raises(TideError):
        find_card("h900")
    unknown = train_config("tiny-shared", None, ["student.checkpoint=nobody/nothing"])
    with pytest.raises(TideError):
        plan_from_statement(caching, 1000, 128, 0.5, given, unknown)
