"""What a user reads before paying for a GPU: what became of the rows, and what the examples look like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from shared.aligned.examples import Prepared
from shared.text.tokenizers import Tokenizer
from teacher_cache.prepared.folder import PreparedData, SourceReport, totals

_WIDTH = 40
_MOST_BINS = 16


def describe(data: PreparedData) -> str:
    """The report of a prepared data set."""
    lines: list[str] = []
    for source in data.record.sources:
        lines += [*_source(source), ""]
    sums = totals(data.record.sources)
    kept = sum(source.kept for source in data.record.sources)
    lines.append(
        f"{data.examples:,} examples are taken, {data.record.duplicates:,} contents came before"
    )
    if kept:
        lines += [
            f"a mean example     {sums['student_tokens'] / kept:,.0f} student tokens, "
            f"{sums['teacher_tokens'] / kept:,.0f} teacher tokens, {sums['turns'] / kept:.2f} trained answers, "
            f"{sums['chunks'] / kept:,.0f} chunks",
            f"trained            {sums['maskable'] / sums['student_tokens']:.1%} of the student's tokens",
        ]
    return "\n".join([*lines, *_losses(sums), "", *_histogram(data.record.sources)])


def losses(data: PreparedData) -> list[str]:
    """A line for each reason for which rows were left out, and for what was lost of the others."""
    reasons: dict[str, int] = {}
    for source in data.record.sources:
        for reason, n in source.dropped.items():
            reasons[reason] = reasons.get(reason, 0) + n
    sums = totals(data.record.sources)
    rows = sums["data_rows"]
    lines = [
        f"left out of {rows:,} rows: {n:,} ({reason})"
        for reason, n in sorted(reasons.items(), key=lambda x: -x[1])
    ]
    return [*lines, *_losses(sums)]


def _losses(sums: dict[str, int]) -> Iterator[str]:
    if sums.get("truncated"):
        yield f"answers cut        {sums['truncated']:,}, at the student's length"
    if sums.get("beyond_teacher"):
        yield f"cross-entropy only {sums['beyond_teacher']:,} examples, whose prompt alone exceeds lengths.teacher"
    for name, n in sums.items():
        if name.startswith("not written"):
            yield f"{name}, in {n:,} conversations"
    if sums.get("response_bytes"):
        lost = sums.get("unaligned_bytes", 0)
        yield (
            f"without alignment  {lost:,} of {sums['response_bytes']:,} response bytes "
            f"({lost / sums['response_bytes']:.2%}), in {sums.get('unaligned_examples', 0):,} examples"
        )


def _source(source: SourceReport) -> Iterator[str]:
    forms = ", ".join(
        f"{name} {n:,}" for name, n in sorted(source.forms.items(), key=lambda x: -x[1])
    )
    yield f"{source.source}"
    yield f"  rows read        {source.rows:,}" + (f" (form: {forms})" if forms else "")
    yield f"  usable           {source.kept:,}, taken {source.taken:,}"
    if source.filtered:
        yield f"  filtered         {source.filtered:,}"
    for reason, n in sorted(source.dropped.items(), key=lambda x: -x[1]):
        yield f"  left out         {n:,}: {reason}"
        yield from (
            f"                     {place}: {detail}"
            for place, detail in source.places.get(reason, [])[:3]
        )


def _histogram(sources: Sequence[SourceReport]) -> Iterator[str]:
    sums: dict[int, int] = {}
    for source in sources:
        for length, n in source.lengths.items():
            sums[int(length)] = sums.get(int(length), 0) + n
    if not sums:
        return
    step = -(-max(sums) // _MOST_BINS // 32) * 32 or 32
    bins = np.zeros(-(-max(sums) // step), np.int64)
    for length, n in sums.items():
        bins[-(-length // step) - 1] += n
    yield "student tokens"
    for i, n in enumerate(bins.tolist()):
        yield f"  {i * step + 1:>6,} – {(i + 1) * step:<6,} {n:>9,} {'█' * round(_WIDTH * n / bins.max())}"


def show(examples: Sequence[Prepared], student: Tokenizer) -> str:
    """Examples as the student reads them: prompt as it is, trained answers in ⟦ ⟧."""
    blocks = []
    for number, example in enumerate(examples):
        head = f"── example {number}: {example.id}" + (
            f" ({example.label})" if example.label else ""
        )
        text, at = "", 0
        for start, stop in example.spans.tolist():
            text += student.decode(example.student_ids[at:start].tolist())
            text += f"⟦{student.decode(example.student_ids[start:stop].tolist())}⟧"
            at = stop
        blocks.append(f"{head}\n{text}{student.decode(example.student_ids[at:].tolist())}")
    return "\n\n".join(blocks)
