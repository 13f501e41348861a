"""The settings of both stages: a recipe (a TOML file) holds any part, the rest has defaults."""

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Discriminator, Field, PlainValidator, Tag

from shared.settings.build import Count, NotNegative, Positive, Share, build, require, strict
from shared.settings.data import DataConfig, LengthConfig, NoiseConfig, Sources, TargetConfig
from shared.settings.own import own_class
from shared.system.files import TideError

TimestepWeight = Literal["uniform", "midrange"]
AdaptedLayer = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
]  # fmt: skip


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
        spread, copies = self.device_map is not None, self.data_parallel
        require(not (spread and self.quantization), "device_map goes without quantization")
        require(not spread or copies == 1, "device_map goes without data_parallel: it has all GPUs")
        numbered = f"device is {self.device}, expected no number: each of {copies} copies has a GPU"
        require(copies == 1 or ":" not in self.device, numbered)


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
    student_chat_template: Path | None = None
    """A file with a Jinja template, in the place of the one that the student's tokenizer has."""
    teacher_chat_template: Path | None = None
    """The same for the teacher's."""
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
        ranks = f"rank is {self.rank} and world {self.world}, expected 0 ≤ rank < world"
        require(0 <= self.rank < self.world, ranks)
        targets, longest = self.targets, max(self.lengths.student, self.lengths.teacher)
        wide = max(2, targets.k, targets.rank or 1, len(targets.stored_temperatures))
        most = (2**31 - 1) // (longest * wide)  # numbers of a column
        large = f"shard_examples is {self.shard_examples}, expected at most {most} with targets.k, "
        require(self.shard_examples <= most, large + "targets.rank and lengths as they are")

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
        size, heads, kv_heads = self.hidden_size, self.heads, self.kv_heads
        even = f"hidden_size is {size}, expected an even multiple of heads ({heads})"
        require(size % (2 * heads) == 0, even)
        require(heads % kv_heads == 0, f"heads is {heads}, expected a multiple of {kv_heads=}")


@strict
class Lora:
    """An adapter of low rank, trained in the stead of linear layers and merged in the end."""

    rank: Annotated[int, Field(gt=0, le=1 << 16)] = 16
    alpha: Count = 32
    """The adapter counts alpha / rank times."""
    targets: Annotated[tuple[AdaptedLayer, ...], Field(min_length=1)] = get_args(AdaptedLayer)
    """The linear layers of every decoder layer that have one."""


@strict
class StudentConfig(ModelShape):
    """The student: a checkpoint, or a new model of this shape with the cache's tokenizer."""

    checkpoint: str | None = None
    """Path or hub id of a Qwen3 or Qwen2 (also the reference's `a2d-`), Llama, SmolLM2 or SmolLM3
    checkpoint (default: random weights)."""
    add_mask_row: bool = False
    """Allow new embedding rows where the checkpoint has none for the mask token."""
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    """`auto`: flex_attention with a compiled block mask on CUDA, else SDPA with a dense one."""
    lora: Lora | None = None
    """Train an adapter alone (peft), such as {rank = 16, alpha = 32}; embeddings keep still."""

    def __post_init__(self) -> None:
        super().__post_init__()
        based = self.lora is None or self.checkpoint is not None
        require(based, "lora is set without a checkpoint, whose weights it would adapt")


@strict
class Tidal:
    """TIDAL's strength λ over training progress and diffusion time (TIDE §2.1)."""

    lambda_init: float = 0.1
    lambda_max: float = 0.9
    axis: Literal["both", "training_only", "timestep_only"] = "both"
    growth: Literal["cosine", "linear"] = "cosine"
    timestep_weight: TimestepWeight = "uniform"

    def __post_init__(self) -> None:
        low, high = self.lambda_init, self.lambda_max
        ordered = "expected 0 ≤ lambda_init ≤ lambda_max ≤ 1"
        require(0 <= low <= high <= 1, f"lambda_init is {low} and lambda_max {high}, {ordered}")


@strict
class NoDistillation:
    """CE alone: the undistilled student."""

    needs: ClassVar = None
    type: Literal["none"] = "none"


@strict
class Gold:
    """The placebo of a distillation over tokens: the gold tokens in the teacher's place, which is
    cross-entropy that weighs every masked token alike.
    """

    needs: ClassVar = None
    type: Literal["gold"] = "gold"


@strict
class Taught:
    """An objective with a teacher: of each row's tokens (`topk`), or of each chunk (`chunks`)."""

    needs: ClassVar[Literal["topk", "chunks"]]
    temperature: Positive = 2.0
    tidal: Tidal | None = None
    type: str = ""


@strict
class KL(Taught):
    """KL(teacher ‖ student) over token logits; with `tidal`, the teacher is TIDAL's mixture."""

    needs: ClassVar = "topk"
    type: Literal["kl"] = "kl"


@strict
class ReverseKL(Taught):
    """KL(student ‖ teacher) over token logits."""

    needs: ClassVar = "topk"
    type: Literal["reverse_kl"] = "reverse_kl"


@strict
class Calm(Taught):
    """Forward CALM over chunk likelihoods."""

    needs: ClassVar = "chunks"
    type: Literal["calm"] = "calm"


@strict
class ReverseCalm(Taught):
    """Reverse CALM over chunk likelihoods (TIDE §2.3)."""

    needs: ClassVar = "chunks"
    type: Literal["reverse_calm"] = "reverse_calm"


def _tag(value: Any) -> str | None:
    name = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return name if not isinstance(name, str) or ":" not in name else _OWN


def _own(value: Any, info: Any) -> Any:
    name = value["type"]
    if not info.context:
        what = f"the type is {name!r}, and what a run has recorded imports no module"
        raise TideError(what, fix=f"name it yourself: `tide replay RUN --objective {name}`")
    return build(own_class(name, Taught), value, name)


_OWN = "module:Class of your own"
Distillation = Annotated[
    Annotated[NoDistillation, Tag("none")]
    | Annotated[Gold, Tag("gold")]
    | Annotated[KL, Tag("kl")]
    | Annotated[ReverseKL, Tag("reverse_kl")]
    | Annotated[Calm, Tag("calm")]
    | Annotated[ReverseCalm, Tag("reverse_calm")]
    | Annotated[Taught, PlainValidator(_own), Tag(_OWN)],
    Discriminator(_tag),
]


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
    epochs: Annotated[float, Field(gt=0, le=1e9)] = 10.0
    max_steps: Annotated[int, Field(le=10**9)] = -1
    """Optimizer steps; overrides `epochs` where positive."""
    global_batch: Annotated[int, Field(gt=0, le=1 << 20)] | None = None
    """Examples of a step on all processes (default: `batch_size` · `accumulation` · processes)."""
    batch_size: Count = 8
    """Examples per device and forward pass; with `global_batch` at most."""
    accumulation: Annotated[int, Field(gt=0, le=1 << 20)] = 1
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
    heldout_draws: Annotated[int, Field(gt=0, le=1000)] = 4
    eval_steps: Count = 500
