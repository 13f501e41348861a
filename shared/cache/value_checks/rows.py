"""Rules for who a row is, where it is masked, and its chunks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from shared.cache.columns import column_name
from shared.cache.value_checks.columns import Columns, inside, marked, rising, spans_hold
from shared.diffusion.noise import TIME_EPSILON

NEAR_ZERO = 1e-3
"""By how much rounding may lift a log-probability above 0."""


def nulls(columns: Columns) -> Iterator[str]:
    """Columns are there or null as the manifest says."""
    manifest = columns.manifest
    topk, chunks = "topk" in manifest.signals, "chunks" in manifest.signals
    wanted: dict[str, bool] = dict.fromkeys(
        ("topk_sizes", "topk_ranks", "topk_logp", "tail_odds"), topk
    )
    wanted |= dict.fromkeys(("chunk_student", "chunk_teacher", "chunk_logp"), chunks)
    if columns.layout.partial:
        wanted["read"] = True
    wanted["class_mass"] = topk and columns.layout.classes > 1
    for name, present in wanted.items():
        nulls = columns.table.column(column_name(name, columns.layout)).null_count
        if nulls != (0 if present else columns.table.num_rows):
            yield f"{name} is {'missing' if present else 'there'}, unlike the manifest says"
    ids, masked = (columns.table.column(n).null_count for n in ("teacher_ids", "teacher_masked"))
    if ids != masked or (not manifest.shared_tokenizer and ids):
        yield "teacher_ids and teacher_masked are missing where they are needed"


def rows(columns: Columns) -> Iterator[str]:
    """Times, ids, lengths; an example once."""
    table, manifest = columns.table, columns.manifest
    t = table.column("t").to_numpy()
    if not (
        np.isfinite(t).all() and (t >= np.float32(TIME_EPSILON) * 0.999).all() and (t <= 1).all()
    ):
        yield f"a time t lies outside [{TIME_EPSILON}, 1): {t.min()} to {t.max()}"
    if len(set(table.column("example_id").to_pylist())) != table.num_rows:
        yield "an example stands in it twice"
    for side in ("student", "teacher"):
        if side == "teacher" and not columns.has("teacher_ids"):
            continue
        ids, limit = columns[f"{side}_ids"].values, getattr(manifest.fingerprint, side).vocabulary
        if ids.size and not (ids.min() >= 0 and ids.max() < limit):
            yield f"{side}_ids holds {ids.min() if ids.min() < 0 else ids.max()}, and the vocabulary has {limit:,} ids"
    longest = manifest.fingerprint.lengths.student + manifest.fingerprint.lengths.block
    sizes = columns["student_ids"].sizes
    if not (sizes.min() > 0 and sizes.max() <= longest):
        yield f"student_ids has {sizes.min()} to {sizes.max()} tokens in a row, and {longest} are the most"


def positions(columns: Columns) -> Iterator[str]:
    """Spans and masked positions lie where they may, and every other column has their number."""
    lengths, masked, spans = columns["student_ids"].sizes, columns["masked"], columns["spans"]
    wrong = spans_hold(spans, lengths)
    if wrong:
        yield f"spans: {wrong}"
        return
    teacher_lengths, places = columns.teacher_side()
    sides = {"masked": (masked, lengths), "teacher_masked": (places, teacher_lengths)}
    if columns.layout.partial:
        sides["read"] = (columns["read"], lengths)
    for name, (column, limit) in sides.items():
        if column.values.size and (
            column.values.min() < 0 or (column.values >= limit[column.owner]).any()
        ):
            yield f"{name} holds a position outside of the tokens"
        elif not rising(column):
            yield f"{name} is not rising"
        else:
            continue
        return
    held = np.bincount(np.repeat(np.arange(len(lengths)), spans.sizes // 2),
                       inside(spans, marked(masked, lengths), lengths), len(lengths))  # fmt: skip
    if (held != masked.sizes).any():
        yield "masked holds a position outside of the spans"
    if (columns["split"].sizes != places.sizes).any():
        yield "split does not have one value a position that the teacher read"
    asked = columns.asked
    if columns.manifest.shared_tokenizer and (places.sizes != asked.sizes).any():
        yield f"teacher_masked and {'read' if columns.layout.partial else 'masked'} differ in number"
    base = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    among = base[masked.owner] + masked.values
    if columns.layout.partial and not np.isin(base[asked.owner] + asked.values, among).all():
        yield "read holds a position that is not masked"
    if not columns.manifest.fingerprint.noise.comp_demo and columns["split"].values.any():
        yield "split is set in a cache without CompDemo"


def chunks(columns: Columns) -> Iterator[str]:
    """Likelihoods are such, and spans of chunks are masked whole on both sides."""
    if not columns.has("chunk_logp"):
        return
    logp = columns["chunk_logp"]
    if not np.isfinite(logp.values).all():
        yield f"{int((~np.isfinite(logp.values)).sum())} values of chunk_logp are not finite"
    elif logp.values.max(initial=0.0) > NEAR_ZERO:
        yield f"chunk_logp is above 0: {logp.values.max():.4g}"
    sides = {
        "student": (columns["student_ids"].sizes, columns["masked"]),
        "teacher": columns.teacher_side(),
    }
    for side, (lengths, masked) in sides.items():
        spans = columns[f"chunk_{side}"]
        wrong = spans_hold(spans, lengths)
        if wrong is None and (spans.sizes != 2 * logp.sizes).any():
            wrong = "not one span a likelihood"
        if wrong is None:
            held = inside(spans, marked(masked, lengths), lengths)
            if (held != np.diff(spans.values.reshape(-1, 2), axis=1)[:, 0]).any():
                wrong = "a span that is not masked whole"
        if wrong:
            yield f"chunk_{side}: {wrong}"
