"""Steps of training on tensors without content: student, batch, loss and optimizer are the real ones."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad_norm_

from pipelines.plan.attention import rehearse_attention
from pipelines.plan.content import fill, no_content
from pipelines.plan.counting import OPTIMIZER, Counter, Kernel
from pipelines.plan.memory import MemoryWatch
from pipelines.plan.syncs import SyncWatch
from pipelines.plan.work import Conversations, manifest_of, rows_of
from shared.diffusion.attention import block_diffusion_places
from shared.models.checkpoint import resolve
from shared.models.loading import meta_model
from shared.settings.config import CacheConfig, TrainConfig
from shared.system.errors import TideError
from shared.system.files import read_json
from student_train.batches.collate import Batch, TargetReader, collate, counts_of
from student_train.losses.fused_head import LossSettings, slice_rows
from student_train.training.step import train_on_loss
from teacher_cache.run.costs import even_layout
from teacher_cache.teachers.registry import find_teacher, published_shape

COMPILED = ("trunk forward", "head and loss", "trunk backward")
_PUBLISHED = "qwen3-0.6b"
"""A student whose sizes are in shapes.toml."""
_STATE = {"adamw": 1.0, "adamw_8bit": 0.25}
"""Bytes of the optimizer's state, of those that are rehearsed (AdamW in float32)."""


@dataclass(frozen=True)
class StepPlan:
    """A step to rehearse. `on_gpu` False: as it runs on a CPU, where its memory can be measured."""

    train: TrainConfig
    cache: CacheConfig
    data: Conversations
    gpu_memory: int | None
    on_gpu: bool = True
    rows: int | None = None
    """Of the embedding, where they are not those of the student's checkpoint."""

    @property
    def vocabulary(self) -> int:
        """Rows of the student's embedding."""
        return int(self.raw["vocab_size"])

    @property
    def raw(self) -> dict[str, Any]:
        """The student's config.json."""
        found = _student_config(self)
        return found if self.rows is None else {**found, "vocab_size": self.rows}


def _student_config(plan: StepPlan) -> dict[str, Any]:
    """The student's config.json: of the checkpoint's folder, of published sizes, or of the shape that is set."""
    settings = plan.train.student
    if settings.checkpoint is not None:
        embedded = settings.checkpoint.startswith("embedded:")
        folder = Path(resolve(settings.checkpoint) if embedded else settings.checkpoint)
        if (folder / "config.json").is_file():
            found: dict[str, Any] = read_json(folder / "config.json")
            return found
        known = published_shape(_PUBLISHED) if _PUBLISHED in settings.checkpoint.lower() else None
        if known is not None:
            return known
        raise TideError(
            f"the sizes of the student {settings.checkpoint} are not on record, and it is no folder here",
            expected="a folder with a config.json, or a student of Qwen3-0.6B",
            fix="--set train.student.checkpoint=PATH",
        )
    return {
        "model_type": settings.architecture, "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.layers, "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads, "head_dim": settings.hidden_size // settings.heads,
        "intermediate_size": settings.intermediate_size, "tie_word_embeddings": True, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 4096,
        "vocab_size": find_teacher(plan.cache.teacher, plan.cache.teachers_file).vocabulary or 4096,
    }  # fmt: skip


def make_batch(plan: StepPlan) -> tuple[Batch, TargetReader]:
    """A batch with content, and what reads its targets."""
    vocabulary = plan.vocabulary
    draws = plan.train.draws_per_step
    if plan.train.batch_size % draws:
        raise TideError(
            f"batch_size is {plan.train.batch_size}, draws_per_step {draws}",
            expected="a multiple of it",
        )
    rows = rows_of(plan.data, plan.cache, vocabulary, plan.train.batch_size // draws, draws)
    entry = find_teacher(plan.cache.teacher, plan.cache.teachers_file)
    manifest = manifest_of(plan.cache, entry, vocabulary - 1)
    return collate(rows, manifest), TargetReader(
        manifest, even_layout(plan.cache.targets, vocabulary)
    )


def _pairs(plan: StepPlan, batch: Batch) -> int:
    """How many pairs of rows see each other."""
    length, draws = batch["clean"].shape[1], plan.train.draws_per_step
    return int(
        block_diffusion_places(batch["places"], length, plan.cache.lengths.block, draws).sum()
    )


class _Step:
    """One step, for those who watch it. What has content is made before tensors without it are. Without `mode` all has
    content, and the step is run.
    """

    def __init__(
        self,
        plan: StepPlan,
        mode: FakeTensorMode | None,
        made: tuple[Batch, TargetReader],
        pairs: int,
    ) -> None:
        real, read = made
        raw = plan.raw
        self.model: Any = fill(
            meta_model(str(raw["model_type"]).removeprefix("a2d-"), raw), torch.float32
        )
        self.model.train()
        block = plan.cache.lengths.block
        rows = slice_rows(plan.vocabulary, plan.gpu_memory)
        train_on_loss(self.model, block, read, rows_per_slice=rows)
        if plan.on_gpu:
            rehearse_attention(self.model, pairs)
        if plan.train.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        if mode is not None:
            real = {k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in real.items()}
        self.batch: Batch = real
        self.settings = LossSettings(
            plan.train.distillation, plan.train.weight, counts_of(self.batch["counts"]), 0.5
        )
        self._half = plan.train.precision != "float32" and plan.on_gpu

    def passes(self, times: int, enter: Any = lambda _: None) -> None:
        """Forward and backward, `times` times, then the optimizer. `enter` hears of the parts."""
        trunk = self.model.model
        hooks = [
            trunk.register_forward_pre_hook(lambda *_: enter("trunk forward")),
            trunk.register_forward_hook(lambda *_: enter("head and loss")),
        ]
        half = torch.autocast("cpu", torch.bfloat16) if self._half else contextlib.nullcontext()
        for _ in range(times):
            with half:
                loss, _sums = self.model(batch=self.batch, settings=self.settings)
            enter("trunk backward")
            loss.backward()
        enter(OPTIMIZER)
        clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for hook in hooks:
            hook.remove()


@contextmanager
def _rehearsed(plan: StepPlan) -> Iterator[_Step]:
    """A step without content; inside, all tensors are so."""
    made = make_batch(plan)
    pairs = _pairs(plan, made[0])
    with no_content() as mode:
        yield _Step(plan, mode, made, pairs)


def step_memory(plan: StepPlan) -> dict[str, int]:
    """Bytes at the peak of a step, by kind (`memory.KINDS`). TideError for an optimizer that cannot be rehearsed."""
    if plan.train.optimizer not in _STATE:
        raise TideError(
            f"{plan.train.optimizer} cannot be rehearsed", expected=f"one of {', '.join(_STATE)}"
        )
    with _rehearsed(plan) as step:
        watch = MemoryWatch(plan.vocabulary)
        watch.hold("weights", step.model.parameters())
        watch.hold("activations", [*step.batch.values(), *step.model.buffers()])
        watch.watch_gradients(step.model)
        with watch:
            step.passes(1)  # with the first step comes the optimizer's state
            watch.hold(
                "optimizer", [t for state in step.optimizer.state.values() for t in state.values()]
            )
            step.passes(min(2, plan.train.accumulation))
    return {
        **watch.peak,
        "optimizer": round(watch.peak["optimizer"] * _STATE[plan.train.optimizer]),
    }


def real_model(plan: StepPlan) -> Any:
    """The student with random content, which gives its loss as in training."""
    return _Step(plan, None, make_batch(plan), 0).model


def real_step(plan: StepPlan) -> Callable[[], None]:
    """The very step with content on this machine's CPU, to measure what it takes; twice, as `step_memory` counts it."""
    made = make_batch(plan)

    def run() -> None:
        step = _Step(plan, None, made, 0)
        step.passes(1)
        step.passes(min(2, plan.train.accumulation))

    return run


def step_kernels(plan: StepPlan) -> tuple[list[Kernel], dict[str, int]]:
    """The kernels of one forward, backward and optimizer step; and the lines that wait for the device."""
    with _rehearsed(plan) as step:
        step.passes(1)
        counter = Counter()
        with counter, SyncWatch() as syncs:
            step.passes(1, counter.enter)
    return counter.kernels, dict(syncs.lines)


def largest_batch(plan: StepPlan, memory: float) -> int:
    """How many examples of a pass fit into `memory` bytes: activations grow evenly with them."""
    draws = plan.train.draws_per_step

    def peak(batch: int) -> int:
        train = dataclasses.replace(plan.train, batch_size=batch)
        return sum(step_memory(dataclasses.replace(plan, train=train)).values())

    one, three = peak(draws), peak(3 * draws)
    each = (three - one) / 2
    return max(0, int(1 + (memory - one) / max(each, 1))) * draws
