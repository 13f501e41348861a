"""`tide inspect CACHE --row …`: one row in readable form."""

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache.manifest import load_manifest
from shared.cache.row import CacheRow
from shared.cache.shards import finished_units, read_shard
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
        expected = f"0 to {manifest.draws - 1}"
        raise TideError(f"{cache} has no finished shard of draw {draw}", expected=expected)
    seen = 0
    for unit in units:
        for row in read_shard(unit.path(cache), layout):
            if which in (row.example_id, row.label) or seen == number:
                return row
            seen += 1
    raise TideError(
        f"{cache} has no row {which!r} in draw {draw}",
        expected=f"an example's id, or 0 to {seen - 1}",
    )


def describe_row(cache: Path, row: CacheRow) -> str:
    """Both token strings with mask and split, what the teacher expects, and the chunks."""
    student = teacher = Tokenizer.load(cache / "student_tokenizer")
    ids, places = row.student_ids, row.asked
    if row.teacher_ids is not None and row.teacher_masked is not None:
        teacher = Tokenizer.load(cache / "teacher_tokenizer")
        ids, places = row.teacher_ids, row.teacher_masked
    parts = dict(zip(places.tolist(), np.where(row.split, "A", "B").tolist(), strict=True))
    lines = [
        f"example {row.example_id}, draw {row.draw}: t {row.t:.3f}, "
        f"{row.masked.size} of {row.maskable} tokens masked",
        "",
        f"student, {len(row.student_ids)} tokens, masked ones in ⟦ ⟧:",
        _marked(student, row.student_ids, dict.fromkeys(row.masked.tolist(), "")),
        "",
        f"teacher, {len(ids)} tokens; pass 1 reads ⟦B:…⟧ with A revealed, pass 2 ⟦A:…⟧ with B:",
        _marked(teacher, ids, {place: f"{part}:" for place, part in parts.items()}),
        "",
        "position  part  p(gold)  token, and what the teacher expects",
    ]
    temperatures, start = load_manifest(cache).temperatures, 0  # of the position's list
    for i, place in enumerate(places.tolist()):
        p, token, expects = np.exp(row.gold_logp[i]), _text(teacher, ids[place]), ""
        if row.topk_sizes is not None:
            assert row.topk_ids is not None and row.topk_logp is not None
            assert row.tail_odds is not None
            size = int(row.topk_sizes[i])
            top = [
                f"{_text(teacher, row.topk_ids[j])} {np.exp(row.topk_logp[j]):.3f}"
                for j in range(start, start + min(_TOP, size))
            ]
            masses = 1 / (1 + np.exp(-row.tail_odds[i].astype(np.float64)))
            tail = [f"{m:.3f} at T = {t:g}" for m, t in zip(masses, temperatures, strict=True)]
            expects = f": {', '.join(top)}; outside of the {size}: {', '.join(tail)}"
            start += size
        lines.append(f"{place:>8}  {parts[place]:>4}  {p:>7.4f}  {token}{expects}")
    if row.chunk_student is not None and row.teacher_ids is not None:
        assert row.chunk_teacher is not None and row.chunk_logp is not None
        lines += ["", " log p(c)  chunk: teacher's tokens | student's tokens"]
        spans = zip(row.chunk_teacher, row.chunk_student, row.chunk_logp, strict=True)
        for (a, b), (c, d), logp in spans:
            left = " ".join(_text(teacher, i) for i in ids[a:b])
            right = " ".join(_text(student, i) for i in row.student_ids[c:d])
            lines.append(f"{logp:>9.3f}  {left} | {right}")
    return "\n".join(lines)


def _text(tokenizer: Tokenizer, token: Any) -> str:
    return repr(str(tokenizer.backend.decode([int(token)])))


def _marked(tokenizer: Tokenizer, ids: np.ndarray, marks: dict[int, str]) -> str:
    """The text with ⟦…⟧ around each run of positions of one mark."""
    texts = []
    for mark, run in groupby(range(len(ids)), key=marks.get):
        text = str(tokenizer.backend.decode([int(ids[place]) for place in run]))
        texts.append(text if mark is None else f"⟦{mark}{text}⟧")
    return "".join(texts)
