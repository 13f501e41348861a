"""The settings of both stages: a recipe (a TOML file) holds any part, the rest has defaults."""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from shared.settings.build import Count, NotNegative, Positive, Share, require, strict
from shared.settings.data import DataConfig, LengthConfig, RowFilter, Sources
from shared.settings.objectives import Distillation, NoDistillation

__all__ = ["CacheConfig", "DataConfig", "EngineConfig", "LengthConfig", "ModelShape", "NoiseConfig",
           "RowFilter", "StudentConfig", "TargetConfig", "TrainConfig"]  # fmt: skip
MOST_CLASSES = 4096


@strict
class NoiseConfig:
    """Draws: one (t, mask, CompDemo split) each."""

    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    draws: Annotated[int, Field(ge=1, le=100)] = 2
    """Draws of every example; an epoch trains on one. A cache grows by raising this number."""
    comp_demo: bool = True
    """Two teacher passes, each revealing the other's part (TIDE §2.2), or one with all masked."""
    demo_ratio: Share = 0.5
    """Probability of part A, which pass 1 reveals and pass 2 reads."""


@strict
class TargetConfig:
    """What is written of the teacher's knowledge."""

    signals: tuple[Literal["topk", "chunks"], ...] = ("topk", "chunks")
    k: Count = 32
    """Logits kept per position, at most."""
    mass: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep logits until their mass at the largest temperature reaches this (1.0: always k)."""
    temperatures: tuple[Positive, ...] = (1.0, 2.0)
    """Temperatures that training can use: the tail's mass is stored at each, and always at 1.0."""
    tail: Literal["prior", "student"] = "prior"
    """The teacher outside its top-k, within a class: its mean over a pilot, or the student."""
    classes: Annotated[int, Field(ge=1, le=MOST_CLASSES)] = 64
    """Classes of the vocabulary whose mass outside the top-k is stored (1: the tail as a whole)."""
    classes_from: str | None = None
    """Path or hub id of the student whose LM head is clustered (default: the teacher's own)."""
    pilot: Count = 4096
    """Positions of the pilot sample, which gives priors and the order of ids."""
    tables_from: Path | None = None
    """A cache whose classes and priors to take: caches of other data can be merged then."""
    values: Literal["levels", "float32"] = "levels"
    """How numbers are kept: rounded to levels (docs/cache-format.md), or exactly."""
    positions: Literal["content", "response"] = "response"
    """Where a teacher with the student's tokenizer is read: at the answers' words, as the paper
    does, or at every masked position, also the end of turn and the EOS behind it."""
    teacher_text: Literal["student", "own"] = "student"
    """What it reads: the student's sequence, or, as in the paper, the chat in its own template."""

    def __post_init__(self) -> None:
        require(len(self.signals) > 0, "signals is empty, expected topk, chunks or both")

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
    """`auto`: as the cache was begun, else bfloat16 where the hardware has it, else float32."""
    tokens_per_batch: Count = 16384
    """Padded tokens in one forward pass, at most (one longer sequence still goes alone)."""
    head_rows: Count = 1024
    """Rows whose full-vocabulary logits exist at one time."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the transformers engine's layers, for all lengths; `auto`: on CUDA."""
    workers: Literal["local", "ray"] = "local"
    """Where `data_parallel` copies run: processes of this machine, or actors of a Ray cluster."""
    tensor_parallel: Count = 1
    """GPUs that share one copy of the teacher (vLLM only)."""
    data_parallel: Count = 1
    """Copies of the teacher, one process each, that share the units of work."""
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    """Spread the teacher's layers over all GPUs (and host memory) where one is too small."""
    quantization: Literal["int8", "int4"] | None = None
    """Keep linear layers in 8 or 4 bits (bitsandbytes); the values of the cache change with it."""

    def __post_init__(self) -> None:
        require(
            self.device_map is None or self.quantization is None,
            "device_map and quantization do not go together: a quantised teacher stays on a device",
        )
        require(
            self.data_parallel == 1 or ":" not in self.device,
            f"device is {self.device}, expected none: each of {self.data_parallel} processes gets "
            "a GPU of its own",
        )
        require(
            self.data_parallel == 1 or self.device_map is None,
            "data_parallel and device_map do not go together: a device map takes all GPUs",
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
    """Default: the one that its tokenizer names, else <|mask|>, added where it is missing."""
    teachers_file: Path | None = None
    """A TOML file with teachers of your own, in the form of registry.toml."""
    out: Path = Path("caches/default")
    metrics_file: Path | None = None
    """Write the progress there too, in Prometheus's text format."""
    shard_examples: Count = 512
    rank: int = 0
    """This one of the `world` runs that share the work, on one file system or through `store`."""
    world: int = 1
    store: str | None = None
    """s3://…, gs://…, hf://… or a path: finished shards are copied there, not computed again."""
    data: Sources = field(default_factory=DataConfig)
    """One source, or several, whose examples are interleaved."""
    dedup: bool = False
    """Leave out examples whose content came before."""
    prepared: Path | None = None
    """Where prepared data lies, which caches share (default: `prepared` beside the cache)."""
    prepare_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that prepare the data; 0: one a core."""
    lengths: LengthConfig = field(default_factory=LengthConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    targets: TargetConfig = field(default_factory=TargetConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        require(self.data != (), "data is empty, expected at least one source")
        require(
            0 <= self.rank < self.world,
            f"rank is {self.rank} and world {self.world}, expected 0 ≤ rank < world",
        )

    @property
    def sources(self) -> tuple[DataConfig, ...]:
        return (self.data,) if isinstance(self.data, DataConfig) else self.data

    @property
    def prepared_folder(self) -> Path:
        return self.prepared or self.out.parent / "prepared"


@strict
class ModelShape:
    """Sizes of a model that starts from random weights."""

    architecture: Literal["qwen3", "llama"] = "qwen3"
    hidden_size: Count = 128
    layers: Count = 4
    heads: Count = 4
    kv_heads: Count = 2
    intermediate_size: Count = 384

    def __post_init__(self) -> None:
        require(
            self.hidden_size % (2 * self.heads) == 0,
            f"hidden_size is {self.hidden_size}, expected an even multiple of heads ({self.heads})",
        )
        require(
            self.heads % self.kv_heads == 0,
            f"heads is {self.heads}, expected a multiple of kv_heads ({self.kv_heads})",
        )


@strict
class StudentConfig(ModelShape):
    """The student: a checkpoint, or a new model of this shape with the cache's tokenizer."""

    checkpoint: str | None = None
    """Path or hub id of an `a2d-qwen3`, Qwen3 or Llama checkpoint (default: random weights)."""
    add_mask_row: bool = False
    """Allow new embedding rows where the checkpoint has none for the mask token."""
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    """`auto`: flex_attention with a compiled block mask on CUDA, else SDPA with a dense one."""


@strict
class TrainConfig:
    """Stage two: `tide train`."""

    cache: Path = Path("caches/default")
    store: str | None = None
    """s3://…, gs://…, hf://… or a path: shards come from there into `cache` as they are needed."""
    store_cache_gb: Positive = 20.0
    """With `store`: how much of it the folder may hold at a time."""
    window: Count = 8
    """Shards among whose rows an epoch shuffles; the order of the shards is shuffled whole."""
    out: Path = Path("runs/default")
    student: StudentConfig = field(default_factory=StudentConfig)
    distillation: Distillation = field(default_factory=NoDistillation)
    weight: NotNegative = 1.0
    """Weight of the distillation term: loss = CE + weight · distillation."""
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0
    epochs: Positive = 10.0
    max_steps: int = -1
    """Optimizer steps; overrides `epochs` where positive."""
    global_batch: Count | None = None
    """Examples of a step on all processes (default: `batch_size` · `accumulation` · processes)."""
    batch_size: Count = 8
    """Examples per device and forward pass; with `global_batch` at most."""
    accumulation: Count = 1
    """Forward passes of a step; with `global_batch` it follows."""
    draws_per_step: Count = 1
    """Draws of an example in one pass, over one clean copy; batches and epochs count draws."""
    learning_rate: Positive = 5e-5
    weight_decay: NotNegative = 0.0
    warmup_ratio: Share = 0.1
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"
    max_grad_norm: Positive = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of products; weights stay float32. `auto`: as begun, else bfloat16 where hardware has it."""
    device: Literal["auto", "cpu"] = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: a whole student on each GPU, or one sharded with its optimizer (FSDP2)."""
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    """PyTorch's fused AdamW; AdamW with 8-bit state (bitsandbytes, CUDA); or Adafactor."""
    gradient_checkpointing: bool = False
    """Keep only what enters each layer and compute the rest again: the same gradients."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of layers and loss, one by one, for all lengths; `auto`: on CUDA."""
    loader_workers: Annotated[int, Field(ge=-1)] = -1
    """Processes that read and collate ahead of each trainer; −1: one on CUDA, none on a CPU."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    run_name: str | None = None
    """What trackers call the run (default: the name of its folder)."""
    checkpoint_steps: Count = 500
    log_steps: Count = 10
    heldout: DataConfig | None = None
    """Examples for the held-out masked NLL, at fixed masks, every `eval_steps` and at the end."""
    heldout_draws: Count = 4
    eval_steps: Count = 500

    def __post_init__(self) -> None:
        require(
            self.checkpoint_steps % self.log_steps == 0,
            f"checkpoint_steps is {self.checkpoint_steps}, expected a multiple of log_steps "
            f"({self.log_steps}), so that a resumed run logs the same curve",
        )
