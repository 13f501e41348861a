"""`tide inspect CACHE --row …`: one row in readable form."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shared.cache.manifest import load_manifest
from shared.cache.row import CacheRow
from shared.cache.shards import Unit, finished_units, read_shard
from shared.system.errors import TideError
from shared.text.tokenizers import Tokenizer

_TOP = 3


def find_row(cache: Path, which: str, draw: int) -> CacheRow:
    """The row of an example's id, or of its number in the draw. TideError where there is none."""
    manifest = load_manifest(cache)
    layout = manifest.layout(cache)
    number = int(which) if which.isdigit() else None
    units = [unit for unit in finished_units(cache) if unit.draw == draw]
    if not units:
        raise TideError(
            f"{cache} has no finished shard of draw {draw}", expected=f"0 to {manifest.draws - 1}"
        )
    seen = 0
    for unit in units:
        rows = read_shard(Unit(draw, unit.part).path(cache), layout)
        for i, row in enumerate(rows):
            if which in (row.example_id, row.label) or seen + i == number:
                return row
        seen += len(rows)
    raise TideError(
        f"{cache} has no row {which!r} in draw {draw}",
        expected=f"an example's id, or 0 to {seen - 1}",
    )


def describe_row(cache: Path, row: CacheRow) -> str:
    """Both token strings with mask and split, what the teacher expects at each position, and the chunks."""
    manifest = load_manifest(cache)
    student = Tokenizer.load(cache / "student_tokenizer")
    own = row.teacher_ids is not None
    teacher = Tokenizer.load(cache / "teacher_tokenizer") if own else student
    ids = row.teacher_ids if row.teacher_ids is not None else row.student_ids
    places = row.teacher_masked if row.teacher_masked is not None else row.asked
    marks = dict(zip(places.tolist(), np.where(row.split, "A", "B").tolist(), strict=True))
    maskable = row.maskable
    lines = [
        f"example {row.example_id}, draw {row.draw}: t {row.t:.3f}, {row.masked.size} of {maskable} tokens masked",
        "",
        f"student, {len(row.student_ids)} tokens, masked ones in ⟦ ⟧:",
        _marked(student, row.student_ids, dict.fromkeys(row.masked.tolist(), "")),
        "",
        f"teacher, {len(ids)} tokens; pass 1 reads ⟦B:…⟧ with A revealed, pass 2 ⟦A:…⟧ with B revealed:",
        _marked(teacher, ids, marks),
        "",
        "position  part  p(gold)  token, and what the teacher expects",
    ]
    ends = np.cumsum(row.topk_sizes) if row.topk_sizes is not None else None
    for i, place in enumerate(places.tolist()):
        p = np.exp(row.gold_logp[i])
        top = ""
        if ends is not None and row.topk_ids is not None and row.topk_logp is not None:
            first = int(ends[i - 1]) if i else 0
            own_top = range(first, min(first + _TOP, int(ends[i])))
            shown = [
                f"{_text(teacher, int(row.topk_ids[j]))} {np.exp(row.topk_logp[j]):.3f}"
                for j in own_top
            ]
            tails = _tails(row, i, manifest.temperatures)
            top = (
                ": "
                + ", ".join(shown)
                + f"; outside of the {int(row.topk_sizes[i]) if row.topk_sizes is not None else 0}: {tails}"
            )
        lines.append(
            f"{place:>8}  {marks[place]:>4}  {p:>7.4f}  {_text(teacher, int(ids[place]))}{top}"
        )
    return "\n".join([*lines, *_chunks(row, student, teacher, ids)])


def _tails(row: CacheRow, i: int, temperatures: tuple[float, ...]) -> str:
    assert row.tail_odds is not None
    masses = 1 / (1 + np.exp(-row.tail_odds[i].astype(np.float64)))
    return ", ".join(
        f"{mass:.3f} at T = {t:g}" for t, mass in zip(temperatures, masses, strict=True)
    )


def _chunks(row: CacheRow, student: Tokenizer, teacher: Tokenizer, ids: np.ndarray) -> list[str]:
    if (
        row.chunk_student is None
        or row.chunk_teacher is None
        or row.chunk_logp is None
        or row.teacher_ids is None
    ):
        return []
    lines = ["", " log p(c)  chunk: teacher's tokens | student's tokens"]
    for (a, b), (c, d), logp in zip(
        row.chunk_teacher, row.chunk_student, row.chunk_logp, strict=True
    ):
        left = " ".join(_text(teacher, int(i)) for i in ids[a:b])
        right = " ".join(_text(student, int(i)) for i in row.student_ids[c:d])
        lines.append(f"{logp:>9.3f}  {left} | {right}")
    return lines


def _text(tokenizer: Tokenizer, token: int) -> str:
    text = tokenizer.backend.decode([token])
    return repr(text if isinstance(text, str) else str(text))


def _marked(tokenizer: Tokenizer, ids: np.ndarray, marks: dict[int, str]) -> str:
    """The text with ⟦…⟧ around each run of positions of one mark."""
    parts: list[tuple[str | None, list[int]]] = []
    for place, token in enumerate(ids.tolist()):
        mark = marks.get(place)
        if not parts or parts[-1][0] != mark:
            parts.append((mark, []))
        parts[-1][1].append(token)
    texts = []
    for mark, tokens in parts:
        text = str(tokenizer.backend.decode(tokens))
        texts.append(text if mark is None else f"⟦{mark + ':' if mark else ''}{text}⟧")
    return "".join(texts)
