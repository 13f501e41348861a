"""List columns as flat arrays, and what many rules ask of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from shared.cache.columns import column_name
from shared.cache.manifest import Manifest
from shared.cache.row import Layout


@dataclass(frozen=True)
class Column:
    """A list column as flat values and where each row's begin."""

    values: np.ndarray
    offsets: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Values of each row."""
        return np.diff(self.offsets)

    def row(self, i: int) -> np.ndarray:
        """Values of row `i`."""
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    @property
    def owner(self) -> np.ndarray:
        """The row of each value."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.sizes)


class Columns:
    """A shard's columns, with what they are measured by."""

    def __init__(self, table: pa.Table, layout: Layout, manifest: Manifest) -> None:
        self.table, self.layout, self.manifest = table, layout, manifest

    def has(self, name: str) -> bool:
        """Whether the column holds anything but nulls."""
        column = self.table.column(column_name(name, self.layout))
        return column.null_count < len(column)

    def __getitem__(self, name: str) -> Column:
        column = self.table.column(column_name(name, self.layout)).combine_chunks()
        offsets = column.offsets.to_numpy().astype(np.int64)
        values = column.values.to_numpy(zero_copy_only=False)
        return Column(values[offsets[0] : offsets[-1]], offsets - offsets[0])

    @property
    def asked(self) -> Column:
        """The student's positions at which a teacher of the same tokenizer was read."""
        return self["read" if self.layout.partial else "masked"]

    def teacher_side(self) -> tuple[np.ndarray, Column]:
        """Lengths of what the teacher read, and the positions at which it was read: a row's own, or the student's."""
        student = (self["student_ids"].sizes, self.asked)
        present = (
            self.table.column("teacher_ids")
            .combine_chunks()
            .is_valid()
            .to_numpy(zero_copy_only=False)
        )
        if not present.any():
            return student
        own = (self["teacher_ids"].sizes, self["teacher_masked"])
        if present.all():
            return own
        lengths = np.where(present, own[0], student[0])
        parts = [(own if mine else student)[1].row(i) for i, mine in enumerate(present)]
        offsets = np.concatenate([[0], np.cumsum([part.size for part in parts])])
        return lengths, Column(np.concatenate(parts), offsets)


def rising(column: Column, strict: bool = True) -> bool:
    """Whether the values of each row rise."""
    step = np.diff(column.values.astype(np.int64))
    same = np.ones(step.size, bool)
    ends = column.offsets[1:-1]
    same[ends[(ends > 0) & (ends < column.values.size)] - 1] = False
    return bool((step[same] > 0).all() if strict else (step[same] >= 0).all())


def spans_hold(spans: Column, lengths: np.ndarray) -> str | None:
    """Why pairs of start and end are no spans, apart and in order, of rows of these lengths."""
    if (spans.sizes % 2).any():
        return "an odd number of ends"
    pairs = spans.values.reshape(-1, 2)
    if (pairs[:, 0] >= pairs[:, 1]).any():
        return "a span that ends before it begins"
    if not rising(spans, strict=False):
        return "spans that are out of order or overlap"
    limit = np.repeat(lengths, spans.sizes // 2)
    return (
        "a span outside of the tokens"
        if pairs.size and (pairs.min() < 0 or (pairs[:, 1] > limit).any())
        else None
    )


def marked(column: Column, lengths: np.ndarray) -> np.ndarray:
    """How many of the positions in `column` lie before each place of the rows put one after the other."""
    base = np.concatenate([[0], np.cumsum(lengths)])
    marks = np.zeros(base[-1] + 1, np.int64)
    marks[base[column.owner] + column.values + 1] = 1
    return np.cumsum(marks)


def inside(spans: Column, marks: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How many marked positions each span holds."""
    base = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    owner = np.repeat(np.arange(len(spans.sizes)), spans.sizes // 2)
    pairs = spans.values.reshape(-1, 2) + base[owner][:, None]
    return marks[pairs[:, 1]] - marks[pairs[:, 0]]
