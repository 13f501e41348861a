"""Settings of what a cache holds: which chats, how long, under which noise, what of the teacher."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from shared.settings.build import Count, NotNegative, Positive, Share, require, strict

Length = Annotated[int, Field(gt=0, le=1 << 20)]  # a row has no more characters
Signals = Annotated[tuple[Literal["topk", "chunks"], ...], Field(min_length=1)]
Form = Literal["auto", "messages", "sharegpt", "instruction", "prompt_completion",
               "question_answer", "tokens"]  # fmt: skip


@strict
class RowFilter:
    """Keeps the rows whose `field` (`a.b`: a field inside another) contains or equals a value."""

    field: str
    contains: str | None = None
    equals: str | int | float | bool | None = None

    def __post_init__(self) -> None:
        one = (self.contains is None) != (self.equals is None)
        require(one, f"the filter on {self.field!r} must have either `contains` or `equals`")


@strict
class DataConfig:
    """One source of chats (`shared.data`, docs/data.md)."""

    source: str = "stdlib:train"
    """A file, folder or glob (JSONL, JSON, CSV, Parquet, Arrow; compressed or not; `save_to_disk`),
    hf://OWNER/NAME[:CONFIG][:SPLIT] or hf://OWNER/NAME#SPLIT, or stdlib:train (and others)."""
    form: Form = "auto"
    """How a row holds its conversation; `auto`: by the fields that it has."""
    messages_field: str | None = None
    """The field of the list of messages, where it has another name."""
    prompt_field: str | None = None
    """With `response_field`: rows hold two texts under these names."""
    response_field: str | None = None
    system_field: str | None = None
    tools_field: str = "tools"
    turns: Literal["last", "all"] = "last"
    """Which answers of a conversation are trained."""
    filter: RowFilter | tuple[RowFilter, ...] = ()
    """What a row must have to take part."""
    split: Literal["all", "train", "heldout"] = "all"
    """By a hash of the content: `heldout` has `heldout_share` of them, `train` the others."""
    heldout_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight: Annotated[float, Field(gt=0, le=10_000)] = 1.0
    """How often every row appears: 0.5 keeps half of the contents, 2 gives each twice."""
    limit: Count | None = None
    """Take the first `limit` usable examples only."""
    allow_bad_rows: NotNegative = 0.1
    """Unusable rows that do not stop the run: a share (and always ten), 0 none, else a number."""

    def __post_init__(self) -> None:
        both = (self.prompt_field is None) == (self.response_field is None)
        require(both, "prompt_field and response_field: one is given, expected both or neither")
        shared = self.split == "all" or self.heldout_share > 0
        require(shared, f"split is {self.split}, expected a positive heldout_share beside it")


# One source of data, or a list of them. (No message shows these tags: they have a space.)
Sources = Annotated[
    Annotated[DataConfig, Tag("one source")] | Annotated[tuple[DataConfig, ...], Tag("a list of")],
    Discriminator(lambda value: "a list of" if isinstance(value, list | tuple) else "one source"),
]


@strict
class LengthConfig:
    """Lengths in tokens. The reference trains at 512 (student), 1024 (cross) or 768 (shared)."""

    student: Length = 512
    teacher: Length = 1024
    block: Length = 32
    """Block of the student's block diffusion; sequences are whole numbers of blocks."""
    end_block: bool = True
    """Add a block of EOS to a row that fills its last block: else nothing teaches to stop there."""

    def __post_init__(self) -> None:
        whole = self.student % self.block == 0
        require(whole, f"student is {self.student}, expected a multiple of block ({self.block})")


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
    whole_chunks: bool = True
    """Across tokenizers: where a token is masked its chunk is masked whole, as in the paper; else
    only those chunks are active of which all tokens happen to be masked."""


@strict
class TargetConfig:
    """What is written of the teacher's knowledge."""

    signals: Signals = ("topk", "chunks")
    k: Count = 8
    """Logits kept per position, at most."""
    mass: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Keep logits until their mass at the largest temperature reaches this (1.0: always k)."""
    temperatures: tuple[Annotated[float, Field(gt=0, le=500)], ...] = (1.0, 2.0)
    """Temperatures of training, at which the tail's mass is stored exactly; so it is at 1.0."""
    rank: Count | None = None
    """Coefficients of the tail, at most; none given: as many as the pilot sample asks for."""
    step: Positive = 0.04
    """By which they are rounded: h costs h²/2 nats."""
    pilot: Count | None = None
    """Positions of the pilot sample; none given: eight times the width of the teacher."""
    tables_from: Path | None = None
    """A cache whose tables to take: caches of other data can be merged then."""
    values: Literal["levels", "float32"] = "levels"
    """How numbers are kept: rounded to levels (docs/cache-format.md), or exactly."""
    positions: Literal["content", "response"] = "response"
    """Where a teacher with the student's tokenizer is read: at the answers' words, as the paper
    does, or at every masked position, also the end of turn and the EOS behind it."""
    teacher_text: Literal["student", "own"] = "student"
    """What it reads: the student's sequence, or, as in the paper, the chat in its own template."""

    @property
    def stored_temperatures(self) -> tuple[float, ...]:
        """Rising, without repetition, with 1.0."""
        return tuple(sorted({1.0, *self.temperatures}))
