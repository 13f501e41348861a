"""What a user reads before paying for a GPU: what became of the rows, how the examples look."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from shared.aligned.examples import Prepared
from shared.text.tokenizers import Tokenizer
from teacher_cache.prepared.folder import PreparedData, RowReport, totals

_BAR = 40  # characters of the longest bar
_MOST_BINS = 16


def describe(data: PreparedData) -> str:
    """The report of a prepared data set."""
    sources = data.record.sources
    lines: list[str] = []
    for source in sources:
        forms = ", ".join(f"{name} {n:,}" for name, n in Counter(source.forms).most_common())
        lines.append(source.source)
        lines.append(f"  rows read        {source.rows:,}" + (f" (form: {forms})" if forms else ""))
        lines.append(f"  usable           {source.kept:,}, taken {source.taken:,}")
        if source.filtered:
            lines.append(f"  filtered         {source.filtered:,}")
        for reason, n in Counter(source.dropped).most_common():
            lines.append(f"  left out         {n:,}: {reason}")
            places = source.places.get(reason, [])[:3]
            lines += [f"                     {place}: {detail}" for place, detail in places]
        lines.append("")
    lines.append(
        f"{data.examples:,} examples are taken, {data.record.duplicates:,} contents came before"
    )
    sums = totals(sources)
    kept = sum(source.kept for source in sources)
    if kept:
        lines.append(
            f"a mean example     {sums['student_tokens'] / kept:,.0f} student tokens, "
            f"{sums['teacher_tokens'] / kept:,.0f} teacher tokens, "
            f"{sums['turns'] / kept:.2f} trained answers, {sums['chunks'] / kept:,.0f} chunks"
        )
        share = sums["maskable"] / sums["student_tokens"]
        lines.append(f"trained            {share:.1%} of the student's tokens")
    return "\n".join([*lines, *_lost(sums), "", *_histogram(sources)])


def losses(data: PreparedData) -> list[str]:
    """A line for each reason that left rows out, and for what was lost of the others."""
    dropped: Counter[str] = Counter()
    for source in data.record.sources:
        dropped.update(source.dropped)
    sums = totals(data.record.sources)
    rows = sums["data_rows"]
    lines = [f"left out of {rows:,} rows: {n:,} ({reason})" for reason, n in dropped.most_common()]
    return [*lines, *_lost(sums)]


def show(examples: Sequence[Prepared], student: Tokenizer) -> str:
    """Examples as the student reads them: prompt as it is, trained answers in ⟦ ⟧."""
    blocks = []
    for number, example in enumerate(examples):
        label = f" ({example.label})" if example.label else ""
        text, at = f"── example {number}: {example.id}{label}\n", 0
        for start, stop in example.spans.tolist():
            text += student.decode(example.student_ids[at:start].tolist())
            text += f"⟦{student.decode(example.student_ids[start:stop].tolist())}⟧"
            at = stop
        blocks.append(text + student.decode(example.student_ids[at:].tolist()))
    return "\n\n".join(blocks)


def _lost(sums: dict[str, int]) -> Iterator[str]:
    if sums.get("truncated"):
        yield f"answers cut        {sums['truncated']:,}, at the student's length"
    if sums.get("beyond_teacher"):
        yield (
            f"cross-entropy only {sums['beyond_teacher']:,} examples, whose prompt alone exceeds "
            "lengths.teacher"
        )
    for name, n in sums.items():
        if name.startswith("not written"):
            yield f"{name}, in {n:,} conversations"
    if sums.get("response_bytes"):
        lost, whole = sums.get("unaligned_bytes", 0), sums["response_bytes"]
        yield (
            f"without alignment  {lost:,} of {whole:,} response bytes ({lost / whole:.2%}), "
            f"in {sums.get('unaligned_examples', 0):,} examples"
        )


def _histogram(sources: Sequence[RowReport]) -> Iterator[str]:
    counts: Counter[int] = Counter()
    for source in sources:
        for length, n in source.lengths.items():
            counts[int(length)] += n
    if not counts:
        return
    step = -(-max(counts) // _MOST_BINS // 32) * 32 or 32
    bins = np.zeros(-(-max(counts) // step), np.int64)
    for length, n in counts.items():
        bins[-(-length // step) - 1] += n
    yield "student tokens"
    for i, n in enumerate(bins.tolist()):
        bar = "█" * round(_BAR * n / bins.max())
        yield f"  {i * step + 1:>6,} – {(i + 1) * step:<6,} {n:>9,} {bar}"
