"""What both stages hold on a GPU, and what a training step computes: the real code at true shapes,
on tensors without content (torch's FakeTensor), added up by torch's MemTracker.

Only attention is replaced: the kernels of a GPU (flash, flex) do not run here, and of them it is
known what they keep for the backward pass.
"""

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.utils import clip_grad_norm_
from transformers import AttentionInterface, AttentionMaskInterface

from shared.cache.manifest import Manifest
from shared.cache.row import CacheRow
from shared.diffusion.attention import block_diffusion_places
from shared.models.checkpoint import resolve
from shared.models.loading import meta_model
from shared.settings.config import CacheConfig, TrainConfig
from shared.system.errors import TideError
from shared.system.files import read_json
from shared.system.hardware import torch_dtype
from student_train.batches.collate import TargetReader, collate, counts_of
from student_train.losses.fused_head import LossSettings, slice_rows
from student_train.training.step import train_on_loss
from teacher_cache.engines.packs import lay_out
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.method.comp_demo import Request
from teacher_cache.method.targets import TargetSpec
from teacher_cache.run.costs import Workload, even_layout, made_up_fingerprint, random_rows, size_of
from teacher_cache.teachers.registry import TeacherEntry, find_teacher, published_shape

FAKE_ATTENTION = "tide_fake"
PUBLISHED_STUDENT = "qwen3-0.6b"  # its sizes are in shapes.toml
STATE = {"adamw": 1.0, "adamw_8bit": 0.25}  # bytes of the optimizer's state ÷ AdamW's in float32


@dataclass(frozen=True)
class Conversations:
    """What the data is like: tokens of a conversation, and which share of them is the answer."""

    tokens: int
    response: float

    def __post_init__(self) -> None:
        if self.tokens < 4 or not 0 < self.response <= 1:
            raise TideError(
                f"conversations of {self.tokens} tokens, {self.response:.0%} of them answers",
                expected="4 tokens or more, and a share above 0",
            )

    def masked(self, draw: int, draws: int, random: np.random.Generator) -> np.ndarray:
        """Masked positions under one of `draws` draws, whose times t are stratified."""
        t = (draw + random.random()) / draws
        prompt = self.tokens - max(1, round(self.tokens * self.response))
        places = np.arange(prompt, self.tokens, dtype=np.int32)
        masked = places[random.random(places.size) < t]
        return masked if masked.size else places[:1]


@dataclass(frozen=True)
class Step:
    """One optimizer step of training: bytes at its peak by kind, and FLOPs."""

    memory: dict[str, int]
    flops: float


class _FlashAttention(torch.autograd.Function):
    """Computes nothing. Kept for the backward pass: inputs, output, and one float32 number a row
    and head.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(
            query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32)
        )
        return out

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def fake_model(raw: dict[str, Any], architecture: str, dtype: torch.dtype) -> Any:
    """A model of these sizes whose attention computes nothing, where tensors are fake."""
    model: Any = meta_model(architecture, raw)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(
                name, torch.empty(buffer.shape, dtype=buffer.dtype), persistent=False
            )
    model.tie_weights()

    def attend(
        _module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        out: Any = _FlashAttention.apply(query, key, value)
        return out.transpose(1, 2), None

    AttentionInterface.register(FAKE_ATTENTION, attend)
    AttentionMaskInterface.register(
        FAKE_ATTENTION, lambda *_, attention_mask=None, **__: attention_mask
    )
    model.set_attn_implementation(FAKE_ATTENTION)
    return model


class PeakTracker(MemTracker):
    """The peak of the whole alone: torch's tracker also keeps each module's, which takes a minute a
    step.
    """

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, held in self._curr_mem_snap.items():
            if held["Total"] > self._peak_mem.get(device, 0):
                self._peak_mem[device] = held["Total"]
                self._peak_mem_snap[device] = dict(held)

    def by_kind(self) -> dict[str, int]:
        """Bytes by what they hold, when there were most."""
        (snapshot,) = self.get_tracker_snapshot("peak").values()
        held = {str(getattr(kind, "value", kind)): size for kind, size in snapshot.items()}
        return {
            "weights": held["Parameter"] + held["Buffer"],
            "gradients": held["Gradient"],
            "optimizer": held["Optstate"],
            "activations": held["Activation"] + held["Temp"] + held["Other"],
        }


def teacher_memory(
    config: CacheConfig, entry: TeacherEntry, raw: dict[str, Any], data: Conversations
) -> dict[str, int]:
    """Bytes at the peak of a full batch of the transformers engine: its packs, head and top-k."""
    settings, targets = config.engine, config.targets
    sizes: Any = meta_model(entry.architecture, raw).config
    requests = teacher_requests(config, data, int(sizes.vocab_size))
    batches = lay_out(entry.attention, requests, int(entry.shift), settings.tokens_per_batch)
    k = targets.k if "topk" in targets.signals else 0
    spec = TargetSpec(k, targets.mass, targets.stored_temperatures)
    dtype = torch_dtype("bfloat16" if settings.dtype == "auto" else settings.dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = fake_model(raw, entry.architecture, dtype)
        engine = TransformersEngine(
            model, entry.attention, spec, shift=entry.shift,
            tokens_per_batch=settings.tokens_per_batch, head_rows=settings.head_rows,
        )  # fmt: skip
        model.set_attn_implementation(FAKE_ATTENTION)
        if k and targets.classes > 1:
            engine.use_classes((np.arange(sizes.vocab_size) % targets.classes).astype(np.int32))
        tracker = PeakTracker()
        tracker.track_external(model)
        batch = (
            torch.nn.Module()
        )  # the head is called once a slice, which MemTracker allows inside a module
        batch.forward = lambda: engine.readings(batches[0], requests)
        with tracker:
            batch()
    return tracker.by_kind()


def teacher_requests(config: CacheConfig, data: Conversations, vocabulary: int) -> list[Request]:
    """The passes of some examples under all draws: more than one batch of them."""
    random = np.random.default_rng(0)
    noise, requests = config.noise, []
    for _ in range(max(1, -(-2 * config.engine.tokens_per_batch // data.tokens))):
        ids = random.integers(0, vocabulary - 1, data.tokens, np.int32)
        for draw in range(noise.draws):
            masked = data.masked(draw, noise.draws, random)
            in_a = random.random(masked.size) < (noise.demo_ratio if noise.comp_demo else 0.0)
            for read in (masked[~in_a], masked[in_a]):
                if read.size:
                    noised = ids.copy()
                    noised[read] = vocabulary - 1
                    requests.append(Request(noised, read, ids[read]))
    return requests


def student_config(train: TrainConfig, cache: CacheConfig) -> dict[str, Any]:
    """The student's config.json: of the checkpoint's folder, of published sizes, or of the shape
    that is set.
    """
    settings = train.student
    if settings.checkpoint is not None:
        embedded = settings.checkpoint.startswith("embedded:")
        folder = Path(resolve(settings.checkpoint) if embedded else settings.checkpoint)
        if (folder / "config.json").is_file():
            return read_json(folder / "config.json")
        known = published_shape(PUBLISHED_STUDENT)
        if known is not None and PUBLISHED_STUDENT in settings.checkpoint.lower():
            return known
        raise TideError(
            f"the sizes of the student {settings.checkpoint} are not on record",
            expected="a folder with a config.json, or a student of Qwen3-0.6B",
            fix="--train student.checkpoint=PATH",
        )
    teacher = find_teacher(cache.teacher, cache.teachers_file)
    return {
        "model_type": settings.architecture, "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.layers, "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads, "tie_word_embeddings": True, "hidden_act": "silu",
        "head_dim": settings.hidden_size // settings.heads, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "intermediate_size": settings.intermediate_size, "max_position_embeddings": 4096,
        "vocab_size": teacher.vocabulary or 4096,
    }  # fmt: skip


def student_rows(
    train: TrainConfig, cache: CacheConfig, data: Conversations, vocabulary: int
) -> tuple[list[CacheRow], Manifest]:
    """The rows of one forward pass, every masked token a chunk; as much of a manifest as collating
    them needs.
    """
    random, rows, draws = np.random.default_rng(0), [], train.draws_per_step
    for example in range(train.batch_size // draws):
        ids = random.integers(0, vocabulary, data.tokens, np.int32)
        for draw in range(draws):
            masked = data.masked(draw, draws, random)
            load = Workload(1, 1, data.tokens, masked.size, data.tokens, masked.size, "")
            (row,) = random_rows(load, cache, vocabulary, 1, draw)
            chunks = None if row.chunk_student is None else np.stack([masked, masked + 1], axis=1)
            row = dataclasses.replace(
                row, example_id=f"{example:016x}", student_ids=ids, t=(draw + 0.5) / draws,
                masked=masked, chunk_student=chunks,
            )  # fmt: skip
            rows.append(row)
    teacher = find_teacher(cache.teacher, cache.teachers_file)
    fingerprint = made_up_fingerprint(cache, teacher.student_tokens, vocabulary, vocabulary - 1)
    return rows, Manifest(fingerprint, cache.noise.draws, 1, 1)


def student_step(
    train: TrainConfig, cache: CacheConfig, data: Conversations, gpu_memory: int
) -> Step:
    """A step of stage two on a card: student, batch, loss and optimizer are the real ones.

    TideError for an optimizer whose state is not known.
    """
    if train.optimizer not in STATE:
        expected = f"one of {', '.join(STATE)}"
        raise TideError(f"the memory of {train.optimizer} is not counted", expected=expected)
    raw = student_config(train, cache)
    vocabulary, block = int(raw["vocab_size"]), cache.lengths.block

    # 1. A batch with content, and how many pairs of rows see each other in its attention.
    rows, manifest = student_rows(train, cache, data, vocabulary)
    batch = collate(rows, manifest)
    counts = counts_of(batch["counts"])
    length, draws = batch["clean"].shape[1], train.draws_per_step
    pairs = int(block_diffusion_places(batch["places"], length, block, draws).sum())

    # 2. The student, without content.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        architecture = str(raw["model_type"]).removeprefix("a2d-")
        model = fake_model(raw, architecture, torch.float32).train()
        read = TargetReader(manifest, even_layout(cache.targets, vocabulary))
        train_on_loss(model, block, read, rows_per_slice=slice_rows(vocabulary, gpu_memory))
        if train.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        fake = {k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in batch.items()}
        settings = LossSettings(train.distillation, train.weight, counts, 0.5)
        half = train.precision != "float32"
        cast = torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext()

        # 3. A step begins with the optimizer's state, and with gradients where passes are added up.
        tracker = PeakTracker()
        tracker.track_external(model, optimizer, *filter(torch.is_tensor, fake.values()))
        with tracker:
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
            if train.accumulation == 1:
                optimizer.zero_grad()
            with cast:
                loss, _ = model(batch=fake, settings=settings)
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
    memory = tracker.by_kind()
    memory["optimizer"] = round(memory["optimizer"] * STATE[train.optimizer])

    # 4. Two FLOPs for every multiply-add of a weight forward, four backward, layers' forward again
    # where nothing is
    # kept; of attention two products forward and five backward.
    size = size_of(model)
    places, masked = int((batch["places"] >= 0).sum()), len(batch["row"])
    again = int(train.gradient_checkpointing)
    layers = (6 + 2 * again) * size.active * places
    attention = (7 + 2 * again) * 2 * pairs * size.width * size.layers
    flops = layers + attention + 6 * size.head * masked
    return Step(memory, flops * train.accumulation)


def largest_batch(
    step: Step,
    train: TrainConfig,
    cache: CacheConfig,
    data: Conversations,
    gpu_memory: int,
    usable: float,
) -> int:
    """The largest batch_size that fits into a share `usable` of a card, from the `step` of these
    settings and another: activations grow evenly with the examples of a pass.
    """
    draws = train.draws_per_step
    other = dataclasses.replace(train, batch_size=draws if train.batch_size > draws else 3 * draws)
    less = sum(student_step(other, cache, data, gpu_memory).memory.values())
    more = sum(step.memory.values())
    each = (more - less) / (train.batch_size - other.batch_size) * draws
    room = usable * gpu_memory - less
    return max(0, other.batch_size // draws + int(room // each)) * draws
