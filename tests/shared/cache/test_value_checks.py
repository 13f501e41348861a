"""What is changed and given a good checksum: every rule refuses what it is for, and training refuses it with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shared.cache.checking import CHECKED, refuse_unsound
from shared.cache.ledger import LEDGER, settle_ledger, whole_ledger
from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit, read_table
from shared.cache.value_checks import problems_in
from shared.system.errors import TideError
from student_train.training.trainer import train_student
from teacher_cache.maintenance.check import check_cache
from teacher_cache.run.build import build_cache
from tests.conftest import small_cache_config
from tests.reading import change_column, layout_of, plain_table, same_values
from tests.student_train.training.test_trainer import config

Edit = Callable[[np.ndarray, np.ndarray], None]


def put(place: int, value: float) -> Edit:
    """Another value at one place of the column."""

    def edit(values: np.ndarray, _offsets: np.ndarray) -> None:
        values[place] = value

    return edit


def swap(values: np.ndarray, _offsets: np.ndarray) -> None:
    values[[0, 1]] = values[[1, 0]]


def repeat(values: np.ndarray, _offsets: np.ndarray) -> None:
    values[1] = values[0]


def every(value: float) -> Edit:
    """One value everywhere."""

    def edit(values: np.ndarray, _offsets: np.ndarray) -> None:
        values[:] = value

    return edit


def to_prompt(values: np.ndarray, offsets: np.ndarray) -> None:
    values[offsets[0]] = 0


def past_the_end(values: np.ndarray, offsets: np.ndarray) -> None:
    values[offsets[1] - 1] = 5000


SHARED: dict[str, tuple[str, Edit, str]] = {
    "a negative token": ("student_ids", put(0, -1), "student_ids holds -1"),
    "a token beyond the vocabulary": ("student_ids", put(0, 10**6), "student_ids holds 1000000"),
    "masks out of order": ("masked", swap, "masked is not rising"),
    "a mask twice": ("masked", repeat, "masked is not rising"),
    "a mask in the prompt": ("masked", to_prompt, "outside of the spans"),
    "a mask past the end": ("masked", past_the_end, "masked holds a position outside"),
    "a mask before the start": ("masked", put(0, -3), "masked holds a position outside"),
    "a span backwards": ("spans", swap, "a span that ends before it begins"),
    "a span past the end": ("spans", put(1, 9999), "a span outside of the tokens"),
    "a likelihood above 1": ("gold_logp_q", put(4, -600), "gold_logp is above 0"),
    "an empty list": ("topk_sizes", put(0, 0), "topk_sizes holds 0"),
    "a list beyond k": ("topk_sizes", put(0, 9), "topk_sizes holds"),
    "lists that take from each other": (
        "topk_sizes", lambda v, _: v.__setitem__(slice(0, 2), [7, 8]), "do not fit"),
    "a negative rank": ("topk_ranks", put(3, -1), "outside of the vocabulary"),
    "a rank beyond the vocabulary": ("topk_ranks", put(3, 10**6), "outside of the vocabulary"),
    "an id twice in a list": ("topk_ranks", repeat, "the same id twice"),
    "levels below the lowest": ("topk_logp_q", put(3, 300), "below its lowest level"),
    "more mass than there is": ("topk_logp_q", every(0), "add up to"),
    "a tail that is not what the list leaves": ("tail_odds_q", every(0), "add up to"),
    "an odds beyond the grid": ("tail_odds_q", put(1, 17000), "tail_odds lies outside"),
    "a cooler tail when heated": ("tail_odds_q", put(1, -3000), "hotter temperature has less"),
    "classes beyond the tail": ("class_mass_q", every(32), "do not add up to the tail's"),
    "classes that hold nothing": ("class_mass_q", every(0), "do not add up to the tail's"),
    "a chunk that is not masked": ("chunk_student", put(0, 0), "not masked whole"),
    "chunks out of order": (
        "chunk_student", lambda v, _: v.__setitem__(slice(0, 4), v[[2, 3, 0, 1]]), "out of order"),
    "a chunk likelihood above 1": ("chunk_logp", put(0, 0.5), "chunk_logp is above 0"),
    "a chunk likelihood that is no number": ("chunk_logp", put(0, float("nan")), "chunk_logp are not finite"),
}  # fmt: skip
CROSS: dict[str, tuple[str, Edit, str]] = {
    "a teacher's token beyond its vocabulary": (
        "teacher_ids",
        put(0, 5000),
        "teacher_ids holds 5000",
    ),
    "a teacher's mask past the end": (
        "teacher_masked",
        past_the_end,
        "teacher_masked holds a position outside",
    ),
    "a teacher's mask twice": ("teacher_masked", repeat, "teacher_masked is not rising"),
    "a teacher's chunk that is not masked": ("chunk_teacher", put(0, 0), "not masked whole"),
}


@pytest.mark.faults("values changed under a checksum that holds")
@pytest.mark.parametrize("case", [*SHARED, *CROSS])
def test_a_changed_value_is_refused_by_verify_and_by_training(
    caches: dict[str, Path], tmp_path: Path, case: str
) -> None:
    """Checksums, counts and the ledger are made anew, so nothing but the values can tell."""
    teacher = "tiny-shared" if case in SHARED else "tiny-cross"
    name, edit, message = (SHARED | CROSS)[case]
    cache = Path(shutil.copytree(caches[teacher], tmp_path / "c"))
    unit = Unit(0, 0)
    column = plain_table(unit.path(cache)).column(name).combine_chunks()
    values = np.asarray(column.values).copy()
    edit(values, column.offsets.to_numpy())
    change_column(cache, unit, name, same_values(column, pa.array(values)))
    (cache / LEDGER).unlink()
    manifest = load_manifest(cache)
    settle_ledger(cache, manifest)
    found = check_cache(cache).problems
    assert message in found[0].text and all(
        "part-00000.parquet" in problem.text for problem in found
    )
    with pytest.raises(TideError, match=r"1 of 6 shards[\s\S]*tide verify") as refused:
        train_student(config(cache, tmp_path / "run", distillation={"type": "none"}))
    assert message in str(refused.value)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.faults("values changed under a checksum that holds")
@pytest.mark.parametrize("value", [-1.0, 0.0, 50.0, float("nan")])
def test_times_that_no_draw_has(caches: dict[str, Path], value: float) -> None:
    cache = caches["tiny-shared"]
    table = read_table(Unit(0, 0).path(cache)).table
    place = table.schema.get_field_index("t")
    t = table.column("t").to_numpy().copy()
    t[1] = value
    changed = table.set_column(place, table.schema.field(place), pa.array(t, pa.float32()))
    (found,) = problems_in(changed, layout_of(cache), load_manifest(cache))
    assert "a time t lies outside" in found


def test_rows_of_one_example_and_columns_that_the_manifest_does_not_know(
    caches: dict[str, Path],
) -> None:
    cache = caches["tiny-shared"]
    layout, manifest = layout_of(cache), load_manifest(cache)
    table = read_table(Unit(0, 0).path(cache)).table
    twice = pa.concat_tables([table, table.slice(0, 1)])
    assert problems_in(twice, layout, manifest) == ["an example stands in it twice"]
    place = table.schema.get_field_index("topk_ranks")
    empty = pa.nulls(table.num_rows, table.schema.field(place).type)
    gone = table.set_column(place, table.schema.field(place), empty)
    assert problems_in(gone, layout, manifest) == [
        "topk_ranks is missing, unlike the manifest says"
    ]
    assert problems_in(table.slice(0, 0), layout, manifest) == []


@pytest.mark.parametrize("values", ["levels", "float32"])
@pytest.mark.parametrize(
    "changes", [{"mass": 0.01, "k": 30}, {"classes": 1}, {"k": 1, "temperatures": (1.0, 5.0)}]
)
def test_what_stage_one_writes_is_sound(
    random_teacher: Path, tmp_path: Path, values: str, changes: dict[str, object]
) -> None:
    """Also adaptive lists, one class, hot temperatures and exact values; a mistake in a rule would show here."""
    targets = {"k": 8, "classes": 5, "pilot": 100, "values": values, **changes}
    config = small_cache_config(
        "tiny-shared", random_teacher, tmp_path / "c", targets=targets, noise={"draws": 1}
    )
    build_cache(config)
    report = check_cache(tmp_path / "c")
    assert report.problems == [] and report.shards == 3


def test_exact_values_are_looked_at_too(random_teacher: Path, tmp_path: Path) -> None:
    targets = {"k": 8, "classes": 5, "pilot": 100, "values": "float32", "signals": ["topk"]}
    build_cache(
        small_cache_config(
            "tiny-shared", random_teacher, tmp_path / "c", targets=targets, noise={"draws": 1}
        )
    )
    cases: dict[str, tuple[Edit, str]] = {
        "topk_logp": (swap, "does not fall"),
        "gold_logp": (put(0, float("nan")), "gold_logp are not finite"),
        "class_mass": (every(-1.0), "do not add up"),
        "tail_odds": (put(0, float("inf")), "tail_odds lies outside"),
    }
    for name, (edit, message) in cases.items():
        cache = Path(shutil.copytree(tmp_path / "c", tmp_path / name))
        column = plain_table(Unit(0, 0).path(cache)).column(name).combine_chunks()
        values = np.asarray(column.values).copy()
        edit(values, column.offsets.to_numpy())
        change_column(cache, Unit(0, 0), name, same_values(column, pa.array(values, pa.float32())))
        (cache / LEDGER).unlink()
        assert any(message in problem.text for problem in check_cache(cache).problems), name


def test_what_passed_is_not_looked_at_again_but_its_bytes_are(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(shutil.copytree(caches["tiny-shared"], tmp_path / "c"))
    (cache / CHECKED).unlink(missing_ok=True)
    manifest = load_manifest(cache)
    layout, ledger = manifest.layout(cache), whole_ledger(cache, manifest)
    looked: list[Unit] = []
    monkeypatch.setattr(
        "shared.cache.checking.problems_in", lambda *_: looked.append(Unit(0, 0)) or []
    )
    refuse_unsound(cache, manifest, layout, ledger)
    assert len(looked) == 6
    refuse_unsound(cache, manifest, layout, ledger)
    assert len(looked) == 6
    path = Unit(1, 2).path(cache)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(TideError, match="not what the cache's ledger says"):
        refuse_unsound(cache, manifest, layout, ledger)
    monkeypatch.setattr(
        "shared.cache.checking._HASHED_AT_ONCE", 0
    )  # a large cache: only the number of bytes
    refuse_unsound(cache, manifest, layout, ledger)
    path.write_bytes(bytes(content[:-1]))
    with pytest.raises(TideError, match="bytes instead of"):
        refuse_unsound(cache, manifest, layout, ledger)
