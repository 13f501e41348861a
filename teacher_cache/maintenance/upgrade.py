"""`tide upgrade`: a cache of format 2 or 3 in today's. No teacher is loaded.

Those formats kept a logsumexp for each temperature, log p as rounded float16 and token ids as they are, and the tail as
one bucket, shaped by the student. All of it is carried over; what they did not keep (priors, classes, the mass of ids
that only one side has) cannot be, so the tail stays what it was. Where rounding had left nothing of a tail it is 1e-7.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from shared.cache.ledger import Entry, note, settle_ledger
from shared.cache.manifest import MANIFEST, Manifest
from shared.cache.manifest_rules import problem_in
from shared.cache.row import SCHEMA_VERSION, CacheRow, Layout
from shared.cache.shards import CACHE, Unit, finished_units, read_table, write_shard
from shared.cache.vocabulary import TABLES, Pilot, Vocabulary, save_tables
from shared.system.errors import TideError
from shared.system.files import read_json
from shared.text.tokenizers import Tokenizer
from teacher_cache.maintenance.reshape import begin

OLD_VERSIONS = (2, 3)
_SMALLEST_TAIL = 1e-7
_LATER: dict[str, dict[str, Any]] = {
    "student": {"vocabulary": 1},
    "teacher": {"vocabulary": 1},
    "targets": {"tail": "student", "classes": 1, "values": "levels"},
}
"""What manifests of the old formats do not say."""


def upgrade_cache(source: Path, target: Path) -> Manifest:
    """Write the cache at `source` to the new folder `target`. Interrupted and called again, it goes on. TideError where
    it is of no old format, or not whole.
    """
    old = _old_manifest(source)
    units = [Unit(draw, part) for draw in range(old["draws"]) for part in range(old["parts"])]
    missing = set(units) - set(finished_units(source))
    if missing:
        raise TideError(f"{source} lacks {len(missing)} shards", expected="a finished cache")
    fingerprint, targets = json.loads(json.dumps(old["fingerprint"])), old["fingerprint"]["targets"]
    layout = Layout(
        tuple(targets["temperatures"]), "levels", _vocabulary(source, units, fingerprint)
    )
    fingerprint |= {"schema": SCHEMA_VERSION, "upgraded_from": old["schema_version"]}
    fingerprint["tables"] = None if layout.vocabulary is None else layout.vocabulary.digest
    for name in (
        "partial",
        "positions",
        "teacher_text",
    ):  # the old formats know one way to read a teacher
        fingerprint["targets"].pop(name, None)
    fingerprint["targets"] |= {
        "tail": "student",
        "classes": 1,
        "classes_from": None,
        "pilot": 0,
        "values": "levels",
    }
    fingerprint["student"]["vocabulary"] = _size(
        source / "student_tokenizer", fingerprint["student"]["mask_id"]
    )
    teacher = source / "teacher_tokenizer"
    fingerprint["teacher"]["vocabulary"] = max(
        _size(
            teacher if teacher.exists() else source / "student_tokenizer",
            fingerprint["teacher"]["mask_id"],
        ),
        0 if layout.vocabulary is None else layout.vocabulary.class_of.size,
    )
    made = Manifest(fingerprint, old["draws"], old["parts"], old["examples"])
    begin(target, made, source, tables=False)
    if layout.vocabulary is not None:
        save_tables(
            target / TABLES, layout.vocabulary, _no_pilot(layout), np.zeros((1, 1), np.float32)
        )
    done = set(finished_units(target))
    for unit in tqdm([unit for unit in units if unit not in done], unit="shard", desc="upgrade"):
        shard = read_table(unit.path(source))
        rows = list(_rows(shard.table, layout))
        names = ("masked", "chunks", "rows_without_chunks")
        counts = {name: shard.counts.get(name, 0) for name in names}
        counts |= {"rows": len(rows), "draw": unit.draw, "part": unit.part, CACHE: made.digest}
        note(target, unit, Entry.of(write_shard(unit.path(target), rows, layout, counts), counts))
    settle_ledger(target, made)
    return made


def _as_today(values: dict[str, Any]) -> dict[str, Any]:
    """An old manifest with what today's say besides, so that its values are judged by the same rules."""
    fingerprint = json.loads(json.dumps(values["fingerprint"]))
    for section, names in _LATER.items():
        fingerprint[section] = {**names, **fingerprint[section]}
    return {**values, "fingerprint": fingerprint}


def _old_manifest(source: Path) -> dict[str, Any]:
    try:
        values = read_json(source / MANIFEST)
        version = values["schema_version"]
        if version in OLD_VERSIONS and (problem := problem_in(_as_today(values))) is not None:
            raise ValueError(problem)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TideError(
            f"{source} has no readable {MANIFEST}: {error}", expected="a cache of format 2 or 3"
        ) from error
    if version not in OLD_VERSIONS:
        raise TideError(
            f"{source} is of format {version}",
            expected=f"format {' or '.join(map(str, OLD_VERSIONS))}",
            fix="nothing is to be done"
            if version == SCHEMA_VERSION
            else "use the version of this package that wrote it",
        )
    return values


def _size(folder: Path, mask_id: int) -> int:
    return max(len(Tokenizer.load(folder)), mask_id + 1)


def _no_pilot(layout: Layout) -> Pilot:
    none = np.zeros(0, np.int32)
    return Pilot(
        none, none, np.zeros(0, np.float32), np.zeros((0, len(layout.temperatures)), np.float32)
    )


def _vocabulary(source: Path, units: list[Unit], fingerprint: dict[str, Any]) -> Vocabulary | None:
    """One class, no prior, and ids ordered by how often they stand in the lists of the whole cache."""
    if "topk" not in fingerprint["targets"]["signals"]:
        return None
    own = "student_tokenizer" if fingerprint["teacher"]["student_tokens"] else "teacher_tokenizer"
    count = np.zeros(_size(source / own, fingerprint["teacher"]["mask_id"]), np.int64)
    for unit in tqdm(units, unit="shard", desc="ids"):
        ids = _flat(read_table(unit.path(source)).table, "topk_ids")[0]
        found = np.bincount(ids, minlength=count.size)
        count = np.pad(count, (0, found.size - count.size)) + found
    temperatures = len(fingerprint["targets"]["temperatures"])
    prior = np.full((temperatures, count.size), 1 / count.size, np.float32)
    rank = np.empty(count.size, np.int32)
    rank[np.argsort(-count, kind="stable")] = np.arange(count.size, dtype=np.int32)
    return Vocabulary(np.zeros(count.size, np.int32), rank, prior)


def _flat(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A list column's values, where each row's begin, and which rows have any."""
    column = table.column(name).combine_chunks()
    return (
        column.values.to_numpy(zero_copy_only=False),
        column.offsets.to_numpy(),
        column.is_valid().to_numpy(False),
    )


def _rows(table: pa.Table, layout: Layout) -> Iterator[CacheRow]:
    lists = {f.name: _flat(table, f.name) for f in table.schema if pa.types.is_list(f.type)}
    plain = {
        f.name: table.column(f.name).to_pylist()
        for f in table.schema
        if not pa.types.is_list(f.type)
    }
    temperatures = layout.temperatures
    for i in range(table.num_rows):
        cell: dict[str, Any] = {
            n: v[o[i] : o[i + 1]] if ok[i] else None for n, (v, o, ok) in lists.items()
        }
        pairs = {
            n: None if cell[n] is None else cell[n].reshape(-1, 2)
            for n in ("chunk_student", "chunk_teacher")
        }
        logsumexp = cell["logsumexp"].reshape(-1, len(temperatures))
        one = logsumexp[:, temperatures.index(1.0)]
        if "spans" in cell:
            spans = cell["spans"].reshape(-1, 2)
        else:  # format 2: one response, to the end
            spans = np.array([[plain["prompt_length"][i], len(cell["student_ids"])]], np.int32)
        logp = None if cell["topk_logp"] is None else cell["topk_logp"].astype(np.float32)
        yield CacheRow(
            example_id=plain["example_id"][i],
            label=plain["label"][i] if "label" in plain else "",
            draw=plain["draw"][i],
            t=plain["t"][i],
            student_ids=cell["student_ids"],
            spans=spans,
            masked=cell["masked"],
            teacher_ids=cell["teacher_ids"],
            teacher_masked=cell["teacher_masked"],
            split=cell["split"],
            gold_logp=np.minimum(cell["gold_logit"] - one, 0.0),
            logsumexp=one,
            topk_sizes=cell["topk_sizes"],
            topk_ids=cell["topk_ids"],
            topk_logp=logp,
            tail_odds=None
            if logp is None
            else _odds(cell["topk_sizes"], logp, logsumexp, temperatures),
            class_mass=None,
            **pairs,
            chunk_logp=cell["chunk_logp"],
        )


def _odds(
    sizes: np.ndarray, logp: np.ndarray, logsumexp: np.ndarray, temperatures: tuple[float, ...]
) -> np.ndarray:
    """The tail's log-odds from what those formats had: one minus the mass of the list, and at least 1e-7."""
    owner, one = np.repeat(np.arange(sizes.size), sizes), temperatures.index(1.0)
    found = []
    for i, temperature in enumerate(temperatures):
        logit = logp.astype(np.float64) + logsumexp[owner, one]
        mass = np.bincount(owner, np.exp(logit / temperature - logsumexp[owner, i]), sizes.size)
        tail = np.maximum(1 - mass, _SMALLEST_TAIL)
        found.append(np.log(tail) - np.log1p(-tail))
    return np.stack(found, axis=1).astype(np.float32)
