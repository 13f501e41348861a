"""`tide inspect`: what a cache holds, from its shards alone: in words, as a picture, or a row."""

import itertools
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache.ledger import in_processes
from shared.cache.manifest import Manifest, load_manifest
from shared.cache.row import CacheRow, Layout
from shared.cache.shards import Unit, column_bytes, finished_units
from shared.cache.value_checks import sound
from shared.system.files import TideError, atomic_file, read_bytes
from shared.text.tokenizers import Tokenizer

T_EDGES = np.linspace(0.0, 1.0, 6)
LOGP_EDGES = np.array([-np.inf, -8.0, -4.0, -2.0, -1.0, -0.5, -0.1, 0.0])
_BANDS = [f"{low:.1f} to {high:.1f}" for low, high in itertools.pairwise(T_EDGES)]
_TOP = 3  # of a list, shown


@dataclass
class Inspection:
    """Sums over the rows that were read. Masses are probabilities, likelihoods nats."""

    manifest: Manifest
    rank: int
    units: list[Unit]
    mass: float = 0.0  # in the top-k
    rows: int = 0
    masked: int = 0
    chunks: int = 0
    positions: int = 0  # those with a top-k
    kept: int = 0  # entries of all lists
    masked_by_t: np.ndarray = field(default_factory=lambda: np.zeros(5, np.int64))
    # chunks by t (rows) and log-likelihood (columns, edges `LOGP_EDGES`)
    likelihoods: np.ndarray = field(default_factory=lambda: np.zeros((5, 7), np.int64))
    # how many chunks have so many teacher and student tokens
    chunk_tokens: Counter[tuple[int, int]] = field(default_factory=Counter)
    bytes_by_column: Counter[str] = field(default_factory=Counter)


def inspect_cache(folder: Path) -> Inspection:
    """Sums over every finished shard, in several processes. TideError where it is no cache."""
    manifest = load_manifest(folder)
    layout, units = manifest.layout(folder), finished_units(folder)
    total = Inspection(manifest, layout.rank, [])
    for part in in_processes(partial(_inspect_shard, folder, manifest, layout), units, "inspect"):
        for name, value in vars(part).items():
            if name not in ("manifest", "rank"):
                setattr(total, name, getattr(total, name) + value)
    return total


def _inspect_shard(folder: Path, manifest: Manifest, layout: Layout, unit: Unit) -> Inspection:
    path = unit.path(folder)
    content = read_bytes(path)
    sums = Inspection(manifest, layout.rank, [unit])
    for row in sound(path, layout, manifest, content).rows(path, layout):
        band = min(4, int(row.t * 5))
        sums.rows += 1
        sums.masked += row.masked.size
        sums.masked_by_t[band] += row.masked.size
        if row.topk_sizes is not None and row.topk_logp is not None:
            sums.kept += int(row.topk_sizes.sum())
            sums.positions += row.topk_sizes.size
            sums.mass += float(np.exp(row.topk_logp).sum())
        if row.chunk_logp is None or row.chunk_student is None or row.chunk_teacher is None:
            continue
        sums.chunks += row.chunk_logp.size
        teacher = np.diff(row.chunk_teacher, axis=1)[:, 0].tolist()
        student = np.diff(row.chunk_student, axis=1)[:, 0].tolist()
        sums.chunk_tokens.update(zip(teacher, student, strict=True))
        # Intervals are open to the left, so that a likelihood of exactly 0 falls into the last one.
        places = np.clip(np.searchsorted(LOGP_EDGES, row.chunk_logp, side="left") - 1, 0, 6)
        sums.likelihoods[band] += np.bincount(places, minlength=7)
    sums.bytes_by_column = column_bytes(content)
    return sums


def describe(sums: Inspection) -> str:
    manifest, known = sums.manifest, sums.manifest.fingerprint
    teacher, targets = known.teacher, known.targets
    kind, engine = f"{teacher.architecture}, {teacher.attention['type']}", known.engine
    shards = f"{len(sums.units)} of {len(manifest.units())} shards"
    lines = [
        f"teacher {teacher.name} ({kind}), engine {engine.type} in {engine.dtype}",
        f"{shards}, {manifest.draws} draws of {manifest.examples:,} examples",
        f"{sums.rows:,} rows, {sums.masked:,} masked positions, {sums.chunks:,} chunks",
    ]
    if sums.positions:
        each, mass = sums.kept / sums.positions, sums.mass / sums.positions
        lines.append(f"top-k: {each:.1f} logits a position, teacher mass {mass:.3f} at T = 1")
        tail = f"{sums.rank} coefficients in steps of {targets.step:g}"
        lines.append(f"tail: {tail}; values as {targets.values}")
    if sums.chunks:
        common = sums.chunk_tokens.most_common(6)
        shown = ", ".join(f"{t}:{s} {n / sums.chunks:.1%}" for (t, s), n in common)
        lines.append(f"chunks, teacher tokens : student tokens: {shown}")
    lines += ["", "by t              masked   share of chunks with log p(c) in nats"]
    lines.append(" " * 26 + "".join(f"{f'≤{edge:g}':>8}" for edge in LOGP_EDGES[1:]))
    for band, masked, counts in zip(_BANDS, sums.masked_by_t, sums.likelihoods, strict=True):
        of_all = counts / max(1, counts.sum())
        shares = "".join(f"{share:>8.1%}" for share in of_all) if sums.chunks else ""
        lines.append(f"{band} {masked:>15,}{shares}")
    total, masked = sums.bytes_by_column.total(), max(1, sums.masked)
    lines += ["", f"bytes on disk by column: {total:,}, {total / masked:.0f} a masked position"]
    for name, size in sums.bytes_by_column.most_common():
        share = size / max(1, total)
        lines.append(f"  {name:<16}{size:>14,}{share:>8.1%}{size / masked:>9.1f}")
    return "\n".join(lines)


def draw_picture(sums: Inspection, path: Path) -> None:
    """As PNG: likelihoods of chunks by t, chunk lengths, masked positions by t, bytes by column."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (likelihoods, lengths), (masked, columns) = figure.subplots(2, 2)
    size = f"{sums.rows:,} rows, {sums.masked:,} masked, {sums.chunks:,} chunks"
    figure.suptitle(f"{sums.manifest.fingerprint.teacher.name}: {size}")
    labels = [f"≤ {edge:g}" for edge in LOGP_EDGES[1:]]
    for band, counts in zip(_BANDS, sums.likelihoods, strict=True):
        if counts.sum():
            likelihoods.plot(labels, counts / counts.sum(), marker="o", label=f"t {band}")
            likelihoods.legend(frameon=False)
    likelihoods.set(title="share of chunks by log p(c), nats", xlabel="log p(c)")
    counts = np.zeros((4, 4))  # teacher's tokens, student's tokens; 4 and more in the last
    for (teacher, student), n in sums.chunk_tokens.items():
        counts[min(teacher, 4) - 1, min(student, 4) - 1] += n
    share = counts / max(1.0, counts.sum())
    lengths.imshow(share, cmap="Blues", vmin=0)
    for (row, column), value in np.ndenumerate(share):
        color = "white" if value > 0.4 else "black"
        lengths.text(column, row, f"{value:.1%}", ha="center", va="center", color=color)
    names = ["1", "2", "3", "4+"]
    lengths.set(title="tokens of a chunk", xlabel="student", ylabel="teacher")
    lengths.set_xticks(range(4), names)
    lengths.set_yticks(range(4), names)
    masked.bar(_BANDS, sums.masked_by_t)
    masked.set(title="masked positions by t", xlabel="t")
    largest = sums.bytes_by_column.most_common(8)[::-1]
    each = [size / max(1, sums.masked) for _, size in largest]
    columns.barh([name for name, _ in largest], each)
    columns.set(title="bytes a masked position by column")
    with atomic_file(path) as handle:
        figure.savefig(handle, format="png", dpi=110)


def find_row(cache: Path, which: str, draw: int) -> CacheRow:
    """The row of an example's id, or of its number in the draw. TideError where there is none."""
    manifest = load_manifest(cache)
    layout = manifest.layout(cache)
    units = [unit for unit in finished_units(cache) if unit.draw == draw]
    shards = (unit.path(cache) for unit in units)
    rows = (row for p in shards for row in sound(p, layout, manifest).rows(p, layout))
    for number, row in enumerate(rows):
        if which in (row.example_id, row.label, str(number)):
            return row
    expected = f"an example's id or number, in draw 0 to {manifest.draws - 1}"
    raise TideError(f"{cache} has no row {which!r} in draw {draw}", expected=expected)


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
    start = 0  # of the position's list
    for i, place in enumerate(places.tolist()):
        p, token, expects = np.exp(row.gold_logp[i]), _text(teacher, ids[place]), ""
        if row.topk_sizes is not None:
            assert row.topk_ids is not None and row.topk_logp is not None
            size = int(row.topk_sizes[i])
            best = slice(start, start + min(_TOP, size))
            pairs = zip(row.topk_ids[best], np.exp(row.topk_logp[best]), strict=True)
            words = ", ".join(f"{_text(teacher, likely)} {p:.3f}" for likely, p in pairs)
            outside = 1 - float(np.exp(row.topk_logp[start : start + size]).sum())
            expects = f": {words}; outside of the {size}: {outside:.3f}"
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
    for mark, run in itertools.groupby(range(len(ids)), key=marks.get):
        text = str(tokenizer.backend.decode([int(ids[place]) for place in run]))
        texts.append(text if mark is None else f"⟦{mark}{text}⟧")
    return "".join(texts)
