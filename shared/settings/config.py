"""Configurations: frozen dataclasses, read from TOML, overridden as `section.key=value` on the command line.

A recipe (a TOML file) holds any part of `TideConfig`; what it leaves out has the defaults below. Variants are
types: the distillation objective is one of the classes in `shared.settings.objectives`, chosen by its `type` field.
"""

from __future__ import annotations

import math
from dataclasses import field
from pathlib import Path
from typing import Literal

from shared.settings.data import DataConfig, LengthConfig, RowFilter, Sources
from shared.settings.objectives import Distillation, NoDistillation
from shared.settings.student import ModelShape, StudentConfig
from shared.settings.variants import require, strict

__all__ = [
    "CacheConfig", "DataConfig", "EngineConfig", "LengthConfig", "ModelShape", "NoiseConfig", "RowFilter",
    "StudentConfig", "TargetConfig", "TrainConfig",
]  # fmt: skip


@strict
class NoiseConfig:
    """Draws: one (t, mask, CompDemo split) each (DESIGN §6)."""

    seed: int = 0
    draws: int = 2
    """Draws of every example; an epoch trains on one. A cache grows by raising this number."""
    comp_demo: bool = True
    """Two teacher passes, each revealing the other's part (TIDE §2.2), or one pass with everything masked."""
    demo_ratio: float = 0.5
    """Probability of part A, which pass 1 reveals and pass 2 reads."""

    def __post_init__(self) -> None:
        require(
            1 <= self.draws <= 100, f"noise.draws is {self.draws}; it must be between 1 and 100"
        )
        require(0 <= self.seed < 1 << 63, f"noise.seed is {self.seed}; it must lie in 0 … 2^63 − 1")
        require(
            0 <= self.demo_ratio <= 1,
            f"noise.demo_ratio is {self.demo_ratio}; it must lie in [0, 1]",
        )


MOST_CLASSES = 4096


@strict
class TargetConfig:
    """What is written of the teacher's knowledge."""

    signals: tuple[Literal["topk", "chunks"], ...] = ("topk", "chunks")
    k: int = 32
    """Logits kept per position, at most."""
    mass: float = 1.0
    """Keep logits until their mass at the largest temperature reaches this (1.0: always k)."""
    temperatures: tuple[float, ...] = (1.0, 2.0)
    """Temperatures at which the tail's mass is stored; training can use these. 1.0 is always stored."""
    tail: Literal["prior", "student"] = "prior"
    """What the teacher is taken for outside its top-k, inside a class: its mean over a pilot sample, or the student."""
    classes: int = 64
    """Classes of the vocabulary whose mass outside the top-k is stored at each temperature (1: the tail as a whole)."""
    classes_from: str | None = None
    """Path or hub id of the checkpoint whose LM head is clustered: the student's (default: the teacher's own)."""
    pilot: int = 4096
    """Positions of the pilot sample, from which priors and the order of ids are taken before the first shard."""
    tables_from: Path | None = None
    """A cache whose classes and priors to take instead of making them: caches of other data that can be merged then."""
    values: Literal["levels", "float32"] = "levels"
    """How numbers are kept: rounded to levels (docs/cache-format.md), or exactly."""
    positions: Literal["content", "response"] = "response"
    """Where a teacher that shares the student's tokenizer is read: at the words of the answers, as the paper does, or
    at every masked position, the end of turn and the EOS behind it too. (Across tokenizers chunks hold words alone.)
    """
    teacher_text: Literal["student", "own"] = "student"
    """What such a teacher reads: the student's sequence, or the conversation in its own template, as the paper has it;
    then its positions are those of the words.
    """

    def __post_init__(self) -> None:
        require(len(self.signals) > 0, "targets.signals is empty; name topk, chunks or both")
        require(self.k > 0, f"targets.k is {self.k}; it must be positive")
        require(0 < self.mass <= 1, f"targets.mass is {self.mass}; it must lie in (0, 1]")
        require(
            all(0 < t < math.inf for t in self.temperatures),
            "targets.temperatures must be positive and finite",
        )
        require(
            1 <= self.classes <= MOST_CLASSES,
            f"targets.classes is {self.classes}; it must be 1 to {MOST_CLASSES}",
        )
        require(self.pilot > 0, f"targets.pilot is {self.pilot}; it must be positive")

    @property
    def stored_temperatures(self) -> tuple[float, ...]:
        """Rising, without repetition, with 1.0."""
        return tuple(sorted({1.0, *self.temperatures}))


@strict
class EngineConfig:
    """How the teacher runs."""

    type: Literal["transformers", "vllm", "auto"] = "transformers"
    """`auto`: vLLM where it is installed and can run the teacher, else transformers."""
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: as the cache was begun, else bfloat16 where the device has it in hardware, float32 elsewhere."""
    tokens_per_batch: int = 16384
    """Padded tokens in one forward pass, at most (one longer sequence still goes alone)."""
    head_rows: int = 1024
    """Rows whose full-vocabulary logits exist at one time."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Decoder layers of the transformers engine by torch.compile, once for all lengths; `auto`: on CUDA."""
    workers: Literal["local", "ray"] = "local"
    """Where `data_parallel` copies run: processes of this machine, or actors of the Ray cluster that is at hand."""
    tensor_parallel: int = 1
    """GPUs that share one copy of the teacher (vLLM only)."""
    data_parallel: int = 1
    """Copies of the teacher, one process each, that share the units of work."""
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    """Spread the teacher's layers over all GPUs (and host memory) where one is too small."""
    quantization: Literal["int8", "int4"] | None = None
    """Keep linear layers in 8 or 4 bits (bitsandbytes); the values of the cache change with it."""

    def __post_init__(self) -> None:
        require(
            self.device_map is None or self.quantization is None,
            "engine.device_map and engine.quantization do not go together: a quantised teacher stays on one device",
        )
        require(self.tokens_per_batch > 0, "engine.tokens_per_batch must be positive")
        require(self.head_rows > 0, "engine.head_rows must be positive")
        require(self.tensor_parallel > 0, "engine.tensor_parallel must be positive")
        require(self.data_parallel > 0, "engine.data_parallel must be positive")
        require(
            self.data_parallel == 1 or ":" not in self.device,
            f"engine.device is {self.device}, but each of {self.data_parallel} processes gets a GPU of its own; "
            "leave engine.device out",
        )
        require(
            self.data_parallel == 1 or self.device_map is None,
            "engine.data_parallel and engine.device_map do not go together: a device map takes all GPUs",
        )


@strict
class CacheConfig:
    """Stage one: `tide cache`."""

    teacher: str = "tiny-cross"
    model: str | None = None
    """Path or hub id of the teacher's weights (default: the registry's)."""
    student_tokenizer: str | None = None
    """Path or hub id of the student's tokenizer (default: the registry's partner)."""
    student_mask_token: str | None = None
    """The student's mask token (default: the one that its tokenizer names, else <|mask|>); where the tokenizer lacks
    it, it is added at the end of the vocabulary.
    """
    teachers_file: Path | None = None
    """A TOML file with teachers of your own, in the form of registry.toml."""
    out: Path = Path("caches/default")
    metrics_file: Path | None = None
    """Write the progress there too, in Prometheus's text format."""
    shard_examples: int = 512
    rank: int = 0
    """Of `world` runs that share the units of work, on one file system or through `store`, this one."""
    world: int = 1
    store: str | None = None
    """s3://…, gs://…, hf://… or a path: every finished shard is copied there, and what is there is not computed."""
    data: Sources = field(default_factory=DataConfig)
    """One source, or several, whose examples are interleaved."""
    dedup: bool = False
    """Leave out examples whose content came before."""
    prepared: Path | None = None
    """Where prepared data lies, which caches share (default: the folder `prepared` beside the cache)."""
    prepare_workers: int = 0
    """Processes that prepare the data; 0: one a core."""
    lengths: LengthConfig = field(default_factory=LengthConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    targets: TargetConfig = field(default_factory=TargetConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        require(self.data != (), "data is empty; name at least one source")
        require(
            self.prepare_workers >= 0,
            f"prepare_workers is {self.prepare_workers}; it must not be negative",
        )
        require(
            self.shard_examples > 0, f"shard_examples is {self.shard_examples}; it must be positive"
        )
        require(
            0 <= self.rank < self.world,
            f"rank is {self.rank} and world {self.world}; 0 ≤ rank < world must hold",
        )

    @property
    def sources(self) -> tuple[DataConfig, ...]:
        """The sources of the data."""
        return (self.data,) if isinstance(self.data, DataConfig) else self.data

    @property
    def prepared_folder(self) -> Path:
        """Where prepared data lies."""
        return self.prepared or self.out.parent / "prepared"


@strict
class TrainConfig:
    """Stage two: `tide train`."""

    cache: Path = Path("caches/default")
    store: str | None = None
    """s3://…, gs://…, hf://… or a path: shards are brought from there as they are needed, into the folder `cache`."""
    store_cache_gb: float = 20.0
    """With `store`: how much of it the folder may hold at a time."""
    window: int = 8
    """Shards among whose rows an epoch shuffles; the order of the shards is shuffled whole (docs/cache-format.md)."""
    out: Path = Path("runs/default")
    student: StudentConfig = field(default_factory=StudentConfig)
    distillation: Distillation = field(default_factory=NoDistillation)
    weight: float = 1.0
    """Weight of the distillation term: loss = CE + weight · distillation (DESIGN §3)."""
    seed: int = 0
    epochs: float = 10.0
    max_steps: int = -1
    """Optimizer steps; overrides `epochs` where positive."""
    global_batch: int | None = None
    """Examples of an optimizer step, on all processes together: divided among these, and further into passes of at most
    `batch_size`. None: `batch_size` · `accumulation` · processes.
    """
    batch_size: int = 8
    """Examples per device and forward pass; with `global_batch` at most."""
    accumulation: int = 1
    """Forward passes of a step; with `global_batch` it follows."""
    draws_per_step: int = 1
    """Draws of an example that a step trains on in one pass, over one clean copy of it (docs/speed.md). Batches count
    draws, and so do epochs: the size and the number of steps do not change.
    """
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    warmup_ratio: float = 0.1
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"
    max_grad_norm: float = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of products; weights stay in float32. `auto`: as the run was begun, else bfloat16 where the device has it in
    hardware, float32 elsewhere.
    """
    device: Literal["auto", "cpu"] = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: a whole student on each GPU, or weights, gradients and optimizer sharded (FSDP2)."""
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    """AdamW in PyTorch's fused kernel; with its state in 8 bits (bitsandbytes, CUDA); or Adafactor."""
    gradient_checkpointing: bool = False
    """Keep only what enters each layer and compute the rest again in the backward pass: the same gradients."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Decoder layers and the loss compiled one by one (torch.compile), once for all lengths; `auto`: on CUDA."""
    loader_workers: int = -1
    """Processes that read and collate ahead of each trainer; −1: one on CUDA, none on a CPU, which they would share."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    run_name: str | None = None
    """What trackers call the run (default: the name of its folder)."""
    checkpoint_steps: int = 500
    log_steps: int = 10
    heldout: DataConfig | None = None
    """Examples for the held-out masked NLL, scored at fixed masks every `eval_steps` and at the end."""
    heldout_draws: int = 4
    eval_steps: int = 500

    def __post_init__(self) -> None:
        positive = ("epochs", "window", "store_cache_gb", "batch_size", "accumulation", "learning_rate",
                    "checkpoint_steps", "log_steps")  # fmt: skip
        for name in positive:
            require(
                0 < getattr(self, name) < math.inf,
                f"{name} is {getattr(self, name)}; it must be positive",
            )
        require(
            self.global_batch is None or self.global_batch > 0,
            f"global_batch is {self.global_batch}; it must be positive",
        )
        require(
            self.draws_per_step > 0, f"draws_per_step is {self.draws_per_step}; it must be positive"
        )
        require(
            self.loader_workers >= -1,
            f"loader_workers is {self.loader_workers}; it must be -1 (auto) or more",
        )
        require(
            self.checkpoint_steps % self.log_steps == 0,
            f"checkpoint_steps ({self.checkpoint_steps}) must be a multiple of log_steps ({self.log_steps}), "
            "so that a resumed run logs the same curve",
        )
        require(0 <= self.seed < 1 << 32, f"seed is {self.seed}; it must lie in 0 … 2^32 − 1")
        require(
            self.heldout_draws > 0, f"heldout_draws is {self.heldout_draws}; it must be positive"
        )
        require(self.eval_steps > 0, f"eval_steps is {self.eval_steps}; it must be positive")
        require(
            0 <= self.warmup_ratio <= 1,
            f"warmup_ratio is {self.warmup_ratio}; it must lie in [0, 1]",
        )
        require(
            self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; it must not be negative"
        )
        require(
            self.max_grad_norm > 0, f"max_grad_norm is {self.max_grad_norm}; it must be positive"
        )
        require(0 <= self.weight < math.inf, f"weight is {self.weight}; it must not be negative")
