"""Caches of formats 2 and 3, written here as those versions wrote them, in today's format."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.cache.manifest import Manifest, load_manifest
from shared.cache.row import CacheRow
from shared.cache.shards import Unit, finished_units
from shared.system.errors import TideError
from student_train.training.trainer import train_student
from teacher_cache.maintenance.check import check_cache
from teacher_cache.maintenance.upgrade import upgrade_cache
from teacher_cache.run.build import build_cache
from tests.conftest import files, small_cache_config
from tests.reading import all_rows, rows_in
from tests.student_train.training.test_trainer import config

INTS, FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())


def old_table(rows: list[CacheRow], version: int) -> pa.Table:
    """The columns of format 2 or 3: a logsumexp a temperature, ids as they are, log p as float16, no tail."""
    columns: dict[str, tuple[pa.DataType, list]] = {
        "example_id": (pa.string(), [r.example_id for r in rows]),
        "draw": (pa.int32(), [r.draw for r in rows]),
        "t": (pa.float32(), [r.t for r in rows]),
    }
    if version == 2:
        columns["prompt_length"] = (pa.int32(), [r.prompt_length for r in rows])
    else:
        columns["label"] = (pa.string(), [r.label for r in rows])
        columns["spans"] = (INTS, [r.spans.reshape(-1) for r in rows])
    for name in ("student_ids", "masked", "teacher_ids", "teacher_masked", "topk_sizes", "topk_ids", "chunk_student",
                 "chunk_teacher"):  # fmt: skip
        columns[name] = (
            INTS,
            [None if (v := getattr(r, name)) is None else v.reshape(-1) for r in rows],
        )
    columns["split"] = (pa.list_(pa.bool_()), [r.split for r in rows])
    columns["gold_logit"] = (FLOATS, [r.gold_logp + r.logsumexp for r in rows])
    columns["logsumexp"] = (FLOATS, [logsumexps(r).reshape(-1) for r in rows])
    columns["topk_logp"] = (pa.list_(pa.float16()), [None if r.topk_logp is None else r.topk_logp.astype(np.float16)
                                                     for r in rows])  # fmt: skip
    columns["chunk_logp"] = (FLOATS, [r.chunk_logp for r in rows])
    arrays = {name: pa.array(values, type=kind) for name, (kind, values) in columns.items()}
    return pa.table(arrays)


def logsumexps(row: CacheRow) -> np.ndarray:
    """Over the logits, at both temperatures, from what is kept today."""
    assert row.topk_sizes is not None and row.topk_logp is not None and row.tail_odds is not None
    owner = np.repeat(np.arange(row.topk_sizes.size), row.topk_sizes)
    found = []
    for i, t in enumerate((1.0, 2.0)):
        inside = np.bincount(
            owner, np.exp((row.topk_logp + row.logsumexp[owner]) / t), row.topk_sizes.size
        )
        found.append(np.log(inside) + np.log1p(np.exp(row.tail_odds[:, i])))
    return np.stack(found, axis=1).astype(np.float32)


def old_cache(source: Path, target: Path, version: int) -> dict:
    """`source` as it would lie on disk in an old format."""
    manifest = load_manifest(source)
    fingerprint = json.loads(json.dumps(manifest.fingerprint))
    for name in ("tables",):
        del fingerprint[name]
    for name in ("tail", "classes", "classes_from", "pilot", "values"):
        del fingerprint["targets"][name]
    for side in ("student", "teacher"):
        del fingerprint[side]["vocabulary"]
    fingerprint["schema"] = version
    made = Manifest(fingerprint, manifest.draws, manifest.parts, manifest.examples, version)
    made.save(target)
    for folder in source.glob("*_tokenizer"):
        shutil.copytree(folder, target / folder.name)
    for unit in finished_units(source):
        rows = rows_in(source, unit)
        counts = {"masked": sum(r.masked.size for r in rows), "cache": made.digest, "rows_without_chunks": 0,
                  "chunks": sum(0 if r.chunk_logp is None else r.chunk_logp.size for r in rows)}  # fmt: skip
        table = old_table(rows, version).replace_schema_metadata(
            {"tide.counts": json.dumps(counts)}
        )
        unit.path(target).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, unit.path(target), compression="zstd")
    return dataclasses.asdict(made)


@pytest.fixture(params=[(2, "tiny-shared"), (3, "tiny-shared"), (3, "tiny-cross")], ids=str)
def old(request: pytest.FixtureRequest, random_teacher: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A cache of today's, exact, and the same in an old format."""
    version, teacher = request.param
    targets = {"k": 8, "classes": 1, "pilot": 100, "values": "float32", "tail": "student"}
    build_cache(small_cache_config(teacher, random_teacher, tmp_path / "new", targets=targets))
    old_cache(tmp_path / "new", tmp_path / "old", version)
    return tmp_path / "new", tmp_path / "old"


def test_what_the_old_formats_kept_is_carried_over(old: tuple[Path, Path], tmp_path: Path) -> None:
    new, source = old
    with pytest.raises(TideError, match=r"schema version [23][\s\S]*tide upgrade"):
        load_manifest(source)
    upgrade_cache(source, tmp_path / "up")
    assert check_cache(tmp_path / "up").problems == []
    for a, b in zip(all_rows(tmp_path / "up"), all_rows(new), strict=True):
        for name in ("example_id", "draw", "t"):
            assert getattr(a, name) == getattr(b, name)
        for name in ("student_ids", "spans", "masked", "teacher_ids", "teacher_masked", "split", "topk_sizes",
                     "topk_ids", "chunk_student", "chunk_teacher", "chunk_logp"):  # fmt: skip
            assert np.array_equal(getattr(a, name), getattr(b, name))
        assert a.topk_logp is not None and b.topk_logp is not None
        assert a.tail_odds is not None and b.tail_odds is not None
        np.testing.assert_allclose(a.gold_logp, b.gold_logp, atol=2e-3)
        np.testing.assert_allclose(
            a.topk_logp, b.topk_logp, atol=0.06
        )  # half a level at p = 1e-3, and float16
        np.testing.assert_allclose(a.tail_odds, b.tail_odds, atol=0.1)
        assert a.class_mass is None


def test_it_goes_on_where_it_was_stopped_and_is_trained_on(
    old: tuple[Path, Path], tmp_path: Path
) -> None:
    _, source = old
    upgrade_cache(source, tmp_path / "up")
    before = files(tmp_path / "up")
    Unit(1, 1).path(tmp_path / "up").unlink()
    made = upgrade_cache(source, tmp_path / "up")
    assert files(tmp_path / "up") == before
    objective = {"type": "kl"} if made.shared_tokenizer else {"type": "reverse_calm"}
    metrics = train_student(
        config(tmp_path / "up", tmp_path / "r", distillation=objective, max_steps=2)
    )
    assert metrics["seconds"] > 0
    with pytest.raises(TideError, match=r"is of format 4[\s\S]*nothing is to be done"):
        upgrade_cache(tmp_path / "up", tmp_path / "again")
