"""Which chats, and how long: the settings of data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from shared.settings.variants import require, strict

_FEW = 10
"""Bad rows that a share allows, however few rows there are."""


@strict
class RowFilter:
    """Keeps the rows whose `field` (`a.b` for a field inside of another) contains a text or item, or equals a value."""

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
    """A file, a folder or a glob (JSONL, JSON, CSV, Parquet, Arrow; compressed or not), a folder of `save_to_disk`,
    hf://OWNER/NAME[:CONFIG][:SPLIT] or hf://OWNER/NAME#SPLIT, or stdlib:train|heldout|all.
    """
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
    """Of a division by a hash of the content: `heldout` has `heldout_share` of the contents, `train` the others."""
    heldout_share: float = 0.0
    weight: float = 1.0
    """How often every row appears: 0.5 keeps half of the contents, 2 gives each twice."""
    limit: int | None = None
    """Take the first `limit` usable examples only."""
    allow_bad_rows: int | float = 0.1
    """Rows that cannot be used and are left out: below 1 a share of all (ten are always allowed), 0 none, else a
    number. More stop the run.
    """

    def __post_init__(self) -> None:
        require(
            self.limit is None or self.limit > 0, f"data.limit is {self.limit}; it must be positive"
        )
        require(
            (self.prompt_field is None) == (self.response_field is None),
            "data.prompt_field and data.response_field go together",
        )
        require(self.weight > 0, f"data.weight is {self.weight}; it must be positive")
        require(
            self.allow_bad_rows >= 0,
            f"data.allow_bad_rows is {self.allow_bad_rows}; it must not be negative",
        )
        require(
            0 <= self.heldout_share < 1,
            f"data.heldout_share is {self.heldout_share}; it must lie in [0, 1)",
        )
        require(
            self.split == "all" or self.heldout_share > 0,
            f"data.split is {self.split}, so data.heldout_share must be positive",
        )

    @property
    def filters(self) -> tuple[RowFilter, ...]:
        """All filters."""
        return (self.filter,) if isinstance(self.filter, RowFilter) else self.filter

    def bad_rows_allowed(self, rows: int) -> int:
        """How many of `rows` rows may be bad."""
        if 0 < self.allow_bad_rows < 1:
            return max(_FEW, int(self.allow_bad_rows * rows))
        return int(self.allow_bad_rows)


def _how_many(value: Any) -> str:
    return SEVERAL if isinstance(value, list | tuple) else ONE


ONE, SEVERAL = "one source", "several sources"
"""Tags of the union, which no user sees."""
Sources = Annotated[
    Annotated[DataConfig, Tag(ONE)] | Annotated[tuple[DataConfig, ...], Tag(SEVERAL)],
    Discriminator(_how_many),
]
"""One source of data, or a list of them."""


@strict
class LengthConfig:
    """Lengths in tokens. The reference trains at 512 (student), 1024 (cross) or 768 (shared teacher)."""

    student: int = 512
    teacher: int = 1024
    block: int = 32
    """Block of the student's block diffusion; the student's sequences are whole numbers of blocks."""
    end_block: bool = True
    """A row whose last response fills its last block without any EOS gets a block of EOS behind it: else nothing
    teaches the student to stop there.
    """

    def __post_init__(self) -> None:
        require(self.block > 0, f"lengths.block is {self.block}; it must be positive")
        require(
            self.student > 0 and self.student % self.block == 0,
            f"lengths.student is {self.student}; it must be a positive multiple of lengths.block ({self.block})",
        )
        require(self.teacher > 0, f"lengths.teacher is {self.teacher}; it must be positive")
