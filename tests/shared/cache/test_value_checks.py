"""What is changed and given a good checksum: every rule refuses it, and so does training."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from shared.cache.ledger import CHECKED, LEDGER, refuse_unsound, settle_ledger, whole_ledger
from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit, read_table
from shared.cache.value_checks import problem_in
from shared.system.files import TideError
from student_train.training.trainer import train_student
from teacher_cache.maintenance.verify import check_cache
from teacher_cache.run.build import build_cache
from tests.conftest import small_cache_config
from tests.reading import change_column, dataset, layout_of, plain_table, same_values
from tests.student_train.training.test_trainer import config

Edit = Callable[[np.ndarray, np.ndarray], None]  # of a column's values, given its offsets


def put(place: Any, value: Any) -> Edit:
    return lambda values, _: values.__setitem__(place, value)


def move(places: list[int], sources: list[int]) -> Edit:
    return lambda values, _: values.__setitem__(places, values[sources])


SWAP, REPEAT, ALL = move([0, 1], [1, 0]), move([1], [0]), slice(None)


def past_the_end(values: np.ndarray, offsets: np.ndarray) -> None:
    values[offsets[1] - 1] = 5000


DAMAGE: dict[str, tuple[str, str, Edit]] = {
    # what: (teacher, column, edit)
    "a negative token": ("tiny-shared", "student_ids", put(0, -1)),
    "masks out of order": ("tiny-shared", "masked", SWAP),
    "a mask twice": ("tiny-shared", "masked", REPEAT),
    "a mask in the prompt": ("tiny-shared", "masked", lambda v, at: v.__setitem__(at[0], 0)),
    "a mask past the end": ("tiny-shared", "masked", past_the_end),
    "a span backwards": ("tiny-shared", "spans", SWAP),
    "a span past the end": ("tiny-shared", "spans", put(1, 9999)),
    "a likelihood above 1": ("tiny-shared", "gold_logp_q", put(4, -600)),
    "an empty list": ("tiny-shared", "topk_sizes", put(0, 0)),
    "a list beyond k": ("tiny-shared", "topk_sizes", put(0, 9)),
    "lists that take from each other": ("tiny-shared", "topk_sizes", put([0, 1], [7, 8])),
    "a negative rank": ("tiny-shared", "topk_ranks", put(3, -1)),
    "an id twice in a list": ("tiny-shared", "topk_ranks", REPEAT),
    "levels below the lowest": ("tiny-shared", "topk_logp_q", put(3, 300)),
    "more mass than there is": ("tiny-shared", "topk_logp_q", put(ALL, 0)),
    "a level beyond the grid": ("tiny-shared", "tail_level_q", put(1, 31000)),
    "a chunk that is not masked": ("tiny-shared", "chunk_student", put(0, 0)),
    "chunks out of order": ("tiny-shared", "chunk_student", move([0, 1, 2, 3], [2, 3, 0, 1])),
    "a chunk likelihood above 1": ("tiny-shared", "chunk_logp", put(0, 0.5)),
    "a chunk likelihood that is no number": ("tiny-shared", "chunk_logp", put(0, float("nan"))),
    "a teacher's token beyond its vocabulary": ("tiny-cross", "teacher_ids", put(0, 5000)),
    "a teacher's mask past the end": ("tiny-cross", "teacher_masked", past_the_end),
    "a teacher's chunk that is not masked": ("tiny-cross", "chunk_teacher", put(0, 0)),
}  # fmt: skip
# Rules of the top-k compare columns with each other: either may be named.
TOGETHER = {"topk_sizes": "topk_ranks"}


def changed(table: pa.Table, name: str, edit: Edit) -> pa.Array:
    column = table.column(name).combine_chunks()
    values = np.asarray(column.values).copy()
    edit(values, column.offsets.to_numpy())
    return same_values(column, pa.array(values, column.type.value_type))


def problem(cache: Path, name: str, column: pa.Array) -> str | None:
    table = read_table(Unit(0, 0).path(cache)).table
    place = table.schema.get_field_index(name)
    field = table.schema.field(place)
    table = table.set_column(place, field, column.cast(field.type))
    return problem_in(table, layout_of(cache), load_manifest(cache))


def test_every_kind_of_damage_is_found(caches: dict[str, Path]) -> None:
    for cache in caches.values():
        table = read_table(Unit(0, 0).path(cache)).table
        assert problem_in(table, layout_of(cache), load_manifest(cache)) is None
    for what, (teacher, name, edit) in DAMAGE.items():
        table = plain_table(Unit(0, 0).path(caches[teacher]))
        said = problem(caches[teacher], name, changed(table, name, edit))
        column = name.removesuffix("_q")
        assert said and said.split()[0] in (column, TOGETHER.get(column)), (what, said)


def test_verify_and_training_refuse_it(caches: dict[str, Path], tmp_path: Path) -> None:
    """Checksums, counts and the ledger are made anew."""
    teacher, name, edit = DAMAGE["a teacher's chunk that is not masked"]
    cache = Path(shutil.copytree(caches[teacher], tmp_path / "c"))
    unit = Unit(0, 0)
    change_column(cache, unit, name, changed(plain_table(unit.path(cache)), name, edit))
    (cache / LEDGER).unlink()
    settle_ledger(cache, load_manifest(cache))
    assert [problem.path for problem in check_cache(cache).problems] == [unit.path(cache)]
    with pytest.raises(TideError, match=name):
        train_student(config(cache, tmp_path / "run", distillation={"type": "none"}))
    assert not (tmp_path / "run" / "run.json").exists()


def test_rows_that_no_draw_has(caches: dict[str, Path]) -> None:
    cache = caches["tiny-shared"]
    layout, manifest = layout_of(cache), load_manifest(cache)
    table = read_table(Unit(0, 0).path(cache)).table
    for value in (-1.0, 0.0, 50.0, float("nan")):
        t = table.column("t").to_numpy().copy()
        t[1] = value
        assert str(problem(cache, "t", pa.array(t))).startswith("t ")
    twice = pa.concat_tables([table, table.slice(0, 1)])
    assert str(problem_in(twice, layout, manifest)).startswith("example_id")
    gone = pa.nulls(table.num_rows, table.schema.field("topk_ranks").type)
    assert str(problem(cache, "topk_ranks", gone)).startswith("topk_ranks")
    codes = table.column("tail_code_q").to_pylist()
    codes[0].pop()
    kind = table.schema.field("tail_code_q").type
    assert str(problem(cache, "tail_code_q", pa.array(codes, kind))).startswith("tail_code")
    assert problem_in(table.slice(0, 0), layout, manifest) is None


ADAPTIVE = {"mass": 0.01, "k": 30, "values": "float32"}
HOT = {"k": 1, "temperatures": (1.0, 5.0), "rank": 1}


@pytest.mark.parametrize("changes", [ADAPTIVE, HOT])
def test_what_stage_one_writes_is_sound(
    random_teacher: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    """Also adaptive lists, one coefficient, hot temperatures and exact values."""
    cache, targets = tmp_path / "c", {"k": 8, "rank": 5, "pilot": 100, **changes}
    settings = {"targets": targets, "noise": {"draws": 1}}
    build_cache(small_cache_config("tiny-shared", random_teacher, cache, **settings))
    report = check_cache(cache)
    assert report.problems == [] and report.shards == 3
    if "values" not in changes:
        return
    exact = {"topk_logp": SWAP, "gold_logp": put(0, float("nan"))}
    exact |= {"tail_code": put(0, float("nan")), "tail_level": put(0, float("inf"))}
    for name, edit in exact.items():
        column = changed(plain_table(Unit(0, 0).path(cache)), name, edit)
        assert str(problem(cache, name, column)).startswith(name)


def test_what_passed_is_not_looked_at_again_but_its_length_and_hash_are(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(shutil.copytree(caches["tiny-shared"], tmp_path / "c"))
    (cache / CHECKED).unlink(missing_ok=True)
    manifest = load_manifest(cache)
    layout, ledger = manifest.layout(cache), whole_ledger(cache, manifest)
    looked: list[int] = []
    monkeypatch.setattr("shared.cache.value_checks.problem_in", lambda *_: looked.append(1))
    refuse_unsound(cache, manifest, layout, ledger)
    refuse_unsound(cache, manifest, layout, ledger)
    assert len(looked) == 6
    # One that comes from elsewhere proves nothing by what lies in it.
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    refuse_unsound(copy, manifest, layout, ledger)
    assert len(looked) == 12
    path = Unit(1, 2).path(cache)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(TideError, match=path.name):
        refuse_unsound(cache, manifest, layout, ledger)
    # A flipped bit is noticed when the shard is read.
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refuse_unsound(cache, manifest, layout, ledger)
    batches = dataset(cache)
    with pytest.raises(TideError, match=path.name):
        list(map(batches.rows, range(len(batches))))
