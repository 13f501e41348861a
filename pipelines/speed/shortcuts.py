"""Work that need not be done: rows of student and teacher, and their time, beside the same computed whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table

from pipelines.plan.stage_two import StepPlan, make_batch, real_model
from pipelines.plan.work import Conversations, requests_of
from pipelines.speed.timing import side_by_side
from shared.models.loading import random_model
from shared.settings.config import CacheConfig, NoiseConfig, StudentConfig, TrainConfig
from shared.settings.objectives import NoDistillation
from student_train.batches.collate import Batch, counts_of
from student_train.losses.fused_head import LossSettings
from teacher_cache.engines.inputs import build_inputs
from teacher_cache.engines.packs import fill, pack_requests
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.method.comp_demo import Request
from teacher_cache.method.targets import TargetSpec
from teacher_cache.teachers.registry import Attention, BlockCausal, Full, Native, X0Xt

DATA = Conversations(384, 2 / 3)
_DRAWS, _EXAMPLES = 4, 4
_TRUE_WIDTH = 4096
"""Of an 8B teacher, for which rows are counted; the time is that of a narrow one, whose packs are cut smaller."""
_STUDENT = StudentConfig(hidden_size=256, layers=4, heads=4, kv_heads=2, intermediate_size=768)
_TEACHER = {
    "model_type": "qwen3", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 768, "vocab_size": 4096, "hidden_act": "silu",
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
}  # fmt: skip


def bench_shortcuts() -> Table:
    """The ratios as a table."""
    title = f"Rows that are run and their time ÷ computed whole; {DATA.tokens} tokens, a third of them prompt, block 32"
    table = Table("what", "rows", "time", title=title)
    for name, (rows, seconds) in {**_students(), **_teachers()}.items():
        table.add_row(name, f"{rows:.2f}", f"{seconds:.2f}")
    return table


def _students() -> dict[str, tuple[float, float]]:
    """One step each on the same draws of the same examples: whole [x_t ; x_0], and with one or four draws a pass."""
    found: dict[str, Batch] = {}
    plans = {m: _plan(m) for m in (1, _DRAWS)}
    model: Any = real_model(plans[1])
    for m, plan in plans.items():
        found[str(m)] = make_batch(plan)[0]
    found["whole"] = _everything(found["1"])
    rows = {
        name: int((batch["places"] >= 0).sum()) / batch["clean"].shape[0]
        for name, batch in found.items()
    }
    per_draw = {name: n / (_DRAWS if name == str(_DRAWS) else 1) for name, n in rows.items()}

    def step(batch: Batch) -> Callable[[], None]:
        settings = LossSettings(NoDistillation(), 1.0, counts_of(batch["counts"]), 0.5)

        def run() -> None:
            model.zero_grad()
            model(batch=batch, settings=settings)[0].backward()

        return run

    seconds = side_by_side({name: step(batch) for name, batch in found.items()}, rounds=3)
    draws = {
        name: len(batch["clean"]) * (_DRAWS if name == str(_DRAWS) else 1)
        for name, batch in found.items()
    }
    each = {name: seconds[name] / draws[name] for name in seconds}
    return {
        f"student, {m} draw{'s' if m > 1 else ''} a pass": (
            per_draw[str(m)] / per_draw["whole"], each[str(m)] / each["whole"]
        )
        for m in (1, _DRAWS)
    }  # fmt: skip


def _plan(draws: int) -> StepPlan:
    """With one draw a pass, examples are as many as there are draws in all."""
    train = TrainConfig(batch_size=_EXAMPLES * _DRAWS, draws_per_step=draws, precision="float32", device="cpu",
                        student=_STUDENT)  # fmt: skip
    cache = CacheConfig(teacher="tiny-shared", noise=NoiseConfig(draws=_DRAWS))
    return StepPlan(train, cache, DATA, None, on_gpu=False)


def _everything(batch: Batch) -> Batch:
    """The same batch with every row of [x_t ; x_0]."""
    count, width = batch["clean"].shape
    places = torch.arange(2 * width).expand(count, -1).contiguous()
    return {**batch, "places": places, "place": batch["column"]}


def _teachers() -> dict[str, tuple[float, float]]:
    """All passes of some examples, in packs and whole."""
    found = {}
    modes: Sequence[tuple[str, Attention]] = [
        ("WeDLM", Native(32)), ("WeDLM as x0_xt", X0Xt(32)), ("SDAR", BlockCausal(4)), ("LLaDA", Full()),
    ]  # fmt: skip
    for name, attention in modes:
        asked = requests_of(DATA, _EXAMPLES, _DRAWS, True, 4096)
        if isinstance(attention, Full):
            asked = _of_other_lengths(asked)
        own, plain = (random_model("qwen3", _TEACHER, torch.float32) for _ in range(2))
        engine = TransformersEngine(
            own, attention, TargetSpec(0, 1.0, (1.0,)), tokens_per_batch=8192
        )
        rows = sum(
            pack.width
            for pack in pack_requests(attention, asked, budget=16_384)
        )
        batches = _in_batches(attention, asked)
        whole = sum(_width(attention, part[0]) * len(part) for part in batches)
        jobs: dict[str, Callable[[], object]] = {
            "packs": lambda engine=engine, asked=asked: engine.score(asked),
            "whole": lambda plain=plain, batches=batches, attention=attention: _whole(
                plain, attention, batches
            ),
        }
        seconds = side_by_side(jobs, rounds=3)
        found[f"teacher, {name}, CompDemo, {_DRAWS} draws"] = (
            rows / whole,
            seconds["packs"] / seconds["whole"],
        )
    return found


def _width(attention: Attention, request: Request) -> int:
    """Rows of a pass that is run whole: twice its length where the mode has two copies of it."""
    return len(request.ids) * (2 if isinstance(attention, X0Xt | Native) else 1)


def _of_other_lengths(asked: list[Request]) -> list[Request]:
    """Cut, so that a batch has padding to save: from two thirds of the length on."""
    random, found = np.random.default_rng(1), []
    for request in asked:
        end = int(random.integers(int(request.read[0]) + 1, len(request.ids) + 1))
        read = request.read[request.read < end]
        found.append(Request(request.ids[:end], read, request.gold[: len(read)]))
    return found


def _in_batches(attention: Attention, asked: list[Request]) -> list[list[Request]]:
    """Like lengths together, 8,192 padded rows a batch."""
    return [
        [asked[i] for i in batch]
        for batch in fill([_width(attention, one) for one in asked], 8192, padded=True)
    ]


@torch.inference_mode()
def _whole(model: Any, attention: Attention, batches: list[list[Request]]) -> None:
    for part in batches:
        inputs = build_inputs(attention, part)
        hidden = model.model(
            input_ids=inputs.ids,
            attention_mask=inputs.mask,
            position_ids=inputs.positions,
            use_cache=False,
        ).last_hidden_state
        row = np.repeat(np.arange(len(part)), [len(request.read) for request in part])
        gold = torch.from_numpy(np.concatenate([request.gold for request in part])).long()
        logits = model.lm_head(hidden[torch.from_numpy(row), inputs.columns]).float()
        torch.log_softmax(logits, dim=1).gather(1, gold[:, None])
