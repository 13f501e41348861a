"""What both stages hold on a GPU, and what a training step computes: the real code at true shapes,
on tensors without content (torch's FakeTensor), added up by torch's MemTracker.

Only attention is replaced: the kernels of a GPU (flash, flex) do not run here, and of them it is
known what they keep for the backward pass.
"""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AttentionInterface

from pipelines.plan.costs import Workload, even_layout, made_up_fingerprint, random_rows, size_of
from shared.cache.manifest import Manifest, load_manifest
from shared.cache.row import CacheRow
from shared.diffusion import block_diffusion_places
from shared.models.checkpoint import resolve
from shared.models.loading import random_model
from shared.settings.config import CacheConfig, TrainConfig
from shared.settings.data import TargetConfig
from shared.system.files import TideError, read_json
from shared.system.hardware import torch_dtype
from student_train.batches.collate import TargetReader, collate, counts_of
from student_train.losses.objective import LossSettings, slice_rows
from student_train.model import train_on_loss, with_adapter
from student_train.training.preflight import halved, on_gpu, settle_batch
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.method import TargetSpec, TeacherView, passes
from teacher_cache.teachers.registry import TeacherEntry, find_teacher, published_shape

logger = logging.getLogger(__name__)
FAKE_ATTENTION = "tide_fake"
USABLE = 0.92  # of a card's memory, for the allocator's gaps and the driver
# Students whose sizes are in shapes.toml, by a part of their names.
PUBLISHED_STUDENTS = ("qwen3-0.6b", "qwen2.5-coder-0.5b", "smollm2-135m", "smollm3-3b")
STATE = {"adamw": 1.0, "adamw_8bit": 0.25}  # bytes of the optimizer's state ÷ AdamW's in float32


@dataclass(frozen=True)
class Conversations:
    """What the data is like: tokens of a conversation, and which share of them is the answer."""

    tokens: int
    response: float

    def __post_init__(self) -> None:
        if self.tokens < 4 or not 0 < self.response <= 1:
            what = f"conversations of {self.tokens} tokens, {self.response:.0%} of them answers"
            raise TideError(what, expected="4 tokens or more, and a share above 0")

    def masked(self, draw: int, draws: int, random: np.random.Generator) -> np.ndarray:
        """Masked positions under one of `draws` draws, whose times t are stratified."""
        t = (draw + random.random()) / draws
        prompt = self.tokens - max(1, round(self.tokens * self.response))
        places = np.arange(prompt, self.tokens, dtype=np.int32)
        masked = places[random.random(places.size) < t]
        return masked if masked.size else places[:1]


class _FlashAttention(torch.autograd.Function):
    """Computes nothing. Kept for the backward pass: inputs, output, one float32 a row and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


_attend: Any = _FlashAttention.apply
AttentionInterface.register(
    FAKE_ATTENTION, lambda _module, q, k, v, *_, **__: (_attend(q, k, v).transpose(1, 2), None)
)


class PeakTracker(MemTracker):
    """The peak of the whole alone: torch's tracker keeps each module's too, a minute a step."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, held in self._curr_mem_snap.items():
            if held["Total"] > self._peak_mem.get(device, 0):
                self._peak_mem[device] = held["Total"]
                self._peak_mem_snap[device] = dict(held)

    def _track_module_params_and_buffers(self, module: Any, install_grad_hooks: bool = True) -> Any:
        """Frozen weights have no gradient that a hook could tell of."""
        hooks = install_grad_hooks and all(weight.requires_grad for weight in module.parameters())
        return super()._track_module_params_and_buffers(module, hooks)

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


def new_engine(
    model: Any, config: CacheConfig, entry: TeacherEntry, k: int, compiled: bool = False
) -> TransformersEngine:
    """The transformers engine of these settings, for a model whose weights do not matter."""
    settings, targets = config.engine, config.targets
    spec = TargetSpec(k, targets.mass, targets.stored_temperatures)
    sizes: Any = {"tokens_per_batch": settings.tokens_per_batch, "head_rows": settings.head_rows}
    return TransformersEngine(
        model, entry.attention, spec, shift=entry.shift, compiled=compiled, **sizes
    )


def teacher_memory(
    config: CacheConfig, entry: TeacherEntry, raw: dict[str, Any], data: Conversations
) -> dict[str, int]:
    """Bytes at the peak of a full batch of the transformers engine: its packs, head and top-k."""
    settings, targets, noise = config.engine, config.targets, config.noise
    k = targets.k if "topk" in targets.signals else 0
    dtype = torch_dtype("bfloat16" if settings.dtype == "auto" else settings.dtype)
    random, requests = np.random.default_rng(0), []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        # 1. The engine, without content.
        model: Any = random_model(entry.architecture, raw, dtype)
        vocabulary = model.config.vocab_size
        engine = new_engine(model, config, entry, k)
        model.set_attn_implementation(FAKE_ATTENTION)
        if (layout := even_layout(targets, vocabulary, model.config.hidden_size)).tables:
            engine.use_tables(layout.tables)

        # 2. The passes of some examples under all draws: more than one batch of them.
        for _ in range(max(1, -(-2 * settings.tokens_per_batch // data.tokens))):
            ids = random.integers(0, vocabulary - 1, data.tokens, np.int32)
            for draw in range(noise.draws):
                masked = data.masked(draw, noise.draws, random)
                in_a = random.random(masked.size) < noise.demo_ratio
                view = TeacherView(ids, masked, in_a, masked)
                requests += [r for r, _ in passes(view, vocabulary - 1, noise.comp_demo)]

        # 3. The first batch. MemTracker allows many calls of the head inside a module.
        tracker = PeakTracker()
        tracker.track_external(model)
        batch = torch.nn.Module()
        batch.forward = lambda: engine.readings(engine.batches(requests)[0], requests)
        with tracker:
            batch()
    return tracker.by_kind()


def student_config(train: TrainConfig, cache: CacheConfig) -> dict[str, Any]:
    """The student's config.json: of its folder, of published sizes, or of the shape that is set."""
    settings, checkpoint = train.student, train.student.checkpoint
    if checkpoint is not None:
        local = Path(resolve(checkpoint) if checkpoint.startswith("embedded:") else checkpoint)
        if (local / "config.json").is_file():
            return read_json(local / "config.json")
        for name in PUBLISHED_STUDENTS:
            if name in checkpoint.lower() and (known := published_shape(name)) is not None:
                return known
        raise TideError(
            f"the sizes of the student {checkpoint} are not on record",
            expected=f"a folder with a config.json, or one of {', '.join(PUBLISHED_STUDENTS)}",
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
    """The rows of one forward pass, every masked token a chunk, and a manifest to collate them."""
    random, rows, draws = np.random.default_rng(0), [], train.draws_per_step
    teacher = find_teacher(cache.teacher, cache.teachers_file)
    known = min(vocabulary, teacher.vocabulary or vocabulary)
    for example in range(train.batch_size // draws):
        ids = random.integers(0, vocabulary, data.tokens, np.int32)
        for draw in range(draws):
            masked = data.masked(draw, draws, random)
            load = Workload(1, 1, data.tokens, masked.size, data.tokens, masked.size, "")
            (row,) = random_rows(load, cache, known, 1, draw, not teacher.student_tokens)
            own = {"example_id": f"{example:016x}", "student_ids": ids, "masked": masked}
            if row.chunk_student is not None:
                spans = np.stack([masked, masked + 1], axis=1)
                own |= {"chunk_student": spans, "chunk_teacher": spans}
                own |= {} if row.teacher_ids is None else {"teacher_masked": masked}
            rows.append(replace(row, t=(draw + 0.5) / draws, **own))
    fingerprint = made_up_fingerprint(cache, teacher.student_tokens, vocabulary, vocabulary - 1)
    return rows, Manifest(fingerprint, cache.noise.draws, 1, 1)


def student_step(
    train: TrainConfig, cache: CacheConfig, data: Conversations, gpu_memory: int
) -> tuple[dict[str, int], float]:
    """A step of stage two on a card, with the real student, batch, loss and optimizer: bytes at its
    peak by kind, and FLOPs. TideError for an optimizer whose state is not known.
    """
    if train.optimizer not in STATE:
        expected = f"one of {', '.join(STATE)}"
        raise TideError(f"the memory of {train.optimizer} is not counted", expected=expected)
    raw = student_config(train, cache)
    vocabulary, block = int(raw["vocab_size"]), cache.lengths.block

    # 1. A batch with content, and how many pairs of rows see each other in its attention.
    rows, manifest = student_rows(train, cache, data, vocabulary)
    entry = find_teacher(cache.teacher, cache.teachers_file)
    mapped = not entry.student_tokens and train.distillation.needs == "topk"
    sizes = (entry.vocabulary or vocabulary, 1, vocabulary) if mapped else (vocabulary,)
    layout = even_layout(cache.targets, *sizes)
    batch = collate(rows, manifest, layout.tables and layout.tables.token_map)
    settings = LossSettings(train.distillation, train.weight, counts_of(batch["counts"]), 0.5)
    length, draws = batch["clean"].shape[1], train.draws_per_step
    pairs = int(block_diffusion_places(batch["places"], length, block, draws).sum())

    # 2. The student, without content.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        architecture = str(raw["model_type"]).removeprefix("a2d-")
        model: Any = random_model(architecture, raw, torch.float32).train().requires_grad_(True)
        model.set_attn_implementation(FAKE_ATTENTION)
        read = TargetReader(layout, vocabulary)
        train_on_loss(model, block, read, rows_per_slice=slice_rows(vocabulary, gpu_memory))
        if train.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with patch.object(torch.utils, "swap_tensors"):  # peft moves what is where it should be
            with_adapter(model, train.student.lora)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        fake = {k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in batch.items()}

        # 3. A step begins with the optimizer's state, and with gradients where passes are added up.
        tracker = PeakTracker()
        tracker.track_external(model, optimizer, *filter(torch.is_tensor, fake.values()))
        with tracker:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
            if train.accumulation == 1:
                optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=train.precision != "float32"):
                loss, _ = model(batch=fake, settings=settings)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
            optimizer.step()
    memory = tracker.by_kind()
    memory["optimizer"] = round(memory["optimizer"] * STATE[train.optimizer])

    # 4. Two FLOPs for a multiply-add of a weight forward, four backward (two where it is frozen),
    # the layers' forward again where nothing is kept; attention's products: two, and five backward.
    size, products = size_of(model), 6 if train.student.lora is None else 4
    again = 2 * int(train.gradient_checkpointing)
    layers = (products + again) * size.active * int((batch["places"] >= 0).sum())
    attention = (7 + again) * 2 * pairs * size.width * size.layers
    head = products * size.head * len(batch["row"])
    return memory, (layers + attention + head) * train.accumulation


def fitted(
    train: TrainConfig, cache: CacheConfig, data: Conversations, card: int, room: float, ranks: int
) -> tuple[int, TrainConfig, dict[str, int], float]:
    """A step on a `card` whose passes are `halved` until it takes at most `room` bytes, or as far
    as can be: how often, the settings, and what `student_step` says of them.
    """
    times = 0
    while True:
        held, flops = student_step(train, cache, data, card)
        smaller = halved(train, ranks)
        if smaller is None or sum(held.values()) <= room:
            return times, train, held, flops
        times, train = times + 1, smaller


def halvings_here(train: TrainConfig) -> int:
    """How often a run's passes are `halved` for the GPU at hand, on conversations of full length; 0
    without a GPU, or where sizes are not on record.
    """
    if not on_gpu(train):
        return 0
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # fewer gaps
    ranks, own = (int(os.environ.get(key, "0")) for key in ("WORLD_SIZE", "LOCAL_RANK"))
    free, card = torch.cuda.mem_get_info(own)
    try:
        known = load_manifest(train.cache).fingerprint
        targets = TargetConfig(temperatures=known.targets.temperatures)
        cache = CacheConfig(known.teacher.name, lengths=known.lengths, targets=targets)
        data, room = Conversations(known.lengths.student, 0.75), USABLE * (card if ranks else free)
        return fitted(settle_batch(train, ranks or 1), cache, data, card, room, ranks or 1)[0]
    except Exception as error:  # training says what is wrong, and halves passes all the same
        if not isinstance(error, TideError):  # the counting itself, which no training is to end for
            logger.warning("what a step takes cannot be counted here: %r", error)
        return 0
