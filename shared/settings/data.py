"""Which chats, and how long: the settings of data."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from shared.settings.build import Count, NotNegative, Positive, require, strict

_FEW = 10  # bad rows that a share allows, however few rows there are


@strict
class RowFilter:
    """Keeps the rows whose `field` (`a.b`: a field inside another) contains or equals a value."""

    field: str
    contains: str | None = None
    equals: str | int | float | bool | None = None

    def __post_init__(self) -> None:
        require(
            (self.contains is None) != (self.equals is None),
            f"the filter on {self.field!r} must have either `contains` or `equals`",
        )


@strict
class DataConfig:
    """One source of chats (`shared.data`, docs/data.md)."""

    source: str = "stdlib:train"
    """A file, folder or glob (JSONL, JSON, CSV, Parquet, Arrow; compressed or not; `save_to_disk`),
    hf://OWNER/NAME[:CONFIG][:SPLIT] or hf://OWNER/NAME#SPLIT, or stdlib:train|heldout|all."""
    form: Literal[
        "auto", "messages", "sharegpt", "instruction", "prompt_completion", "question_answer"
    ] = "auto"
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
    weight: Positive = 1.0
    """How often every row appears: 0.5 keeps half of the contents, 2 gives each twice."""
    limit: Count | None = None
    """Take the first `limit` usable examples only."""
    allow_bad_rows: NotNegative = 0.1
    """Unusable rows that do not stop the run: a share (and always ten), 0 none, else a number."""

    def __post_init__(self) -> None:
        require(
            (self.prompt_field is None) == (self.response_field is None),
            "only one of prompt_field and response_field is given, expected both or neither",
        )
        require(
            self.split == "all" or self.heldout_share > 0,
            f"split is {self.split} and heldout_share 0, expected a positive heldout_share",
        )

    @property
    def filters(self) -> tuple[RowFilter, ...]:
        return (self.filter,) if isinstance(self.filter, RowFilter) else self.filter

    def bad_rows_allowed(self, rows: int) -> int:
        """How many of `rows` rows may be bad."""
        if 0 < self.allow_bad_rows < 1:
            return max(_FEW, int(self.allow_bad_rows * rows))
        return int(self.allow_bad_rows)


# One source of data, or a list of them. (No message shows these tags: they have a space.)
Sources = Annotated[
    Annotated[DataConfig, Tag("one source")] | Annotated[tuple[DataConfig, ...], Tag("a list of")],
    Discriminator(lambda value: "a list of" if isinstance(value, list | tuple) else "one source"),
]


@strict
class LengthConfig:
    """Lengths in tokens. The reference trains at 512 (student), 1024 (cross) or 768 (shared)."""

    student: Count = 512
    teacher: Count = 1024
    block: Count = 32
    """Block of the student's block diffusion; sequences are whole numbers of blocks."""
    end_block: bool = True
    """Add a block of EOS to a row that fills its last block: else nothing teaches to stop there."""

    def __post_init__(self) -> None:
        require(
            self.student % self.block == 0,
            f"student is {self.student}, expected a multiple of block ({self.block})",
        )
