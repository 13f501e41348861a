"""`tide plan` and `tide cache --dry-run`: what a run needs, before anything is run."""

from __future__ import annotations

from dataclasses import dataclass

from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import meta_model
from shared.settings.config import CacheConfig
from teacher_cache.run.costs import (
    ModelSize,
    Workload,
    assumed_workload,
    bytes_per_draw,
    in_bytes,
    sampled_workload,
    size_of,
)
from teacher_cache.run.open import open_or_begin
from teacher_cache.teachers.registry import TeacherEntry, find_teacher, known_shape

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Speed:
    """The throughput that GPU hours are stated for: tokens a second, or a share of the card's peak."""

    tokens_per_second: float | None = None
    tflops: float = 989.0
    """Dense bfloat16 peak of one H100 SXM."""
    mfu: float = 0.35

    def seconds(self, tokens: float, flops: float) -> float:
        """Time for one draw of one example."""
        if self.tokens_per_second is not None:
            return tokens / self.tokens_per_second
        return flops / (self.tflops * 1e12 * self.mfu)

    def words(self) -> str:
        """The assumption."""
        if self.tokens_per_second is not None:
            return f"{self.tokens_per_second:,.0f} tokens/s (stated)"
        return f"{self.tflops:,.0f} TFLOP/s at {self.mfu:.0%} utilisation (stated)"


@dataclass(frozen=True)
class Prices:
    """What things cost, in any currency."""

    gpu_hour: float
    terabyte_month: float


def plan_from_statement(
    config: CacheConfig,
    examples: int,
    tokens: int,
    response: float,
    speed: Speed,
    prices: Prices | None = None,
) -> str:
    """A plan without checkpoint, tokenizers or data: sizes on record, means as the user states them."""
    entry = find_teacher(config.teacher, config.teachers_file)
    shape = known_shape(entry) if config.model is None else None
    raw = shape or open_checkpoint(resolve(config.model or entry.model)).config
    return _describe(
        config,
        entry,
        raw,
        assumed_workload(entry, config, examples, tokens, response),
        speed,
        prices,
    )


def plan_from_data(config: CacheConfig, speed: Speed) -> str:
    """A plan from the checkpoint's config, the real tokenizers and the real data. Nothing is written."""
    plan = open_or_begin(config)
    return _describe(plan.config, plan.entry, plan.checkpoint.config, sampled_workload(plan), speed)


def _describe(
    config: CacheConfig,
    entry: TeacherEntry,
    raw: dict,
    load: Workload,
    speed: Speed,
    prices: Prices | None = None,
) -> str:
    model = meta_model(entry.architecture, raw)
    size = size_of(model)
    rows = int(model.config.vocab_size)
    draws = config.noise.draws
    flops = size.flops(load, load.tokens / max(load.passes, 1e-9))
    each = bytes_per_draw(load, config, rows, not entry.student_tokens)
    hours = load.examples * draws * speed.seconds(load.tokens, flops) / 3600
    memory = _memory(config, size, rows)
    lines = [
        f"{config.teacher}: {entry.architecture}, {size.parameters / 1e9:.2f} B parameters, "
        f"{(size.active + size.head) / 1e9:.2f} B met by a token that is read",
        f"workload          {load.source}",
        f"examples          {load.examples:,} × {draws} draws",
        f"a draw            {load.passes:.2f} passes, {load.tokens:,.0f} tokens, {load.masked:,.0f} masked positions, "
        f"{load.chunks:,.0f} chunks",
        f"GPU memory        {in_bytes(memory)}: weights in {config.engine.quantization or _dtype(config)}, logits "
        f"of {config.engine.head_rows:,} rows, hidden states of {config.engine.tokens_per_batch:,} tokens",
        f"on disk           {in_bytes(each)} a draw, {each / max(load.masked, 1e-9):,.0f} bytes a masked position, "
        f"{in_bytes(each * load.examples * draws)} in all (random logits do not compress: an upper bound)",
        f"compute           {flops / 1e12:,.3g} TFLOP a draw, {flops * load.examples * draws / 1e18:,.3g} EFLOP in all",
        f"GPU hours         {hours:,.1f} at {speed.words()}",
    ]
    if prices is not None:
        disk = each * load.examples * draws / 1e12 * prices.terabyte_month
        lines.append(
            f"money             {hours * prices.gpu_hour:,.0f} for the GPUs, {disk:,.2f} a month for the disk "
            f"({prices.gpu_hour:g} a GPU hour, {prices.terabyte_month:g} a terabyte and month, stated)"
        )
    return "\n".join(lines)


def _dtype(config: CacheConfig) -> str:
    """A plan is for GPUs, where `auto` is bfloat16."""
    return "bfloat16" if config.engine.dtype == "auto" else config.engine.dtype


def _memory(config: CacheConfig, size: ModelSize, vocabulary: int) -> float:
    """Weights, one slice of logits in float32 with its top-k copy, and activations of one batch (about 12 widths)."""
    each = {"int8": 1.0, "int4": 0.5}.get(config.engine.quantization or "", _BYTES[_dtype(config)])
    kept = 2 * size.head * _BYTES[_dtype(config)]  # embedding and head keep their precision
    weights = (size.parameters - 2 * size.head) * each + kept
    width = size.head / vocabulary
    return (
        weights
        + 3 * 4 * config.engine.head_rows * vocabulary
        + 12 * 2 * config.engine.tokens_per_batch * width
    )
