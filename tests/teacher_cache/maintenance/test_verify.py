"""What is looked at in a cache, what is found in it, and the commands that say it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from typer.testing import CliRunner

from pipelines.cli import app
from shared.cache.ledger import LEDGER
from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit, finished_units, read_table
from shared.system.files import TideError
from student_train.batches.collate import TargetReader, collate
from student_train.losses.targets import teacher_log_weights
from teacher_cache.maintenance.derive import prune_cache
from teacher_cache.maintenance.inspect import describe, find_row, inspect_cache
from teacher_cache.maintenance.verify import check_cache, delete_damaged, verify_cache
from teacher_cache.run.build import build_cache
from tests.conftest import TEACHER_TOKENIZER, files, small_cache_config
from tests.reading import change_column, layout_of, plain_table, rows_in, same_values

GOLD = "gold_logp_q"


def change_gold(cache: Path, unit: Unit, place: int | slice, by: int) -> None:
    """Add to levels of the gold tokens' likelihoods, with checksums that hold."""
    column = plain_table(unit.path(cache)).column(GOLD).combine_chunks()
    values = np.asarray(column.values).copy()
    values[place] += by
    change_column(cache, unit, GOLD, same_values(column, pa.array(values)))


def test_verifying(caches: dict[str, Path], random_teacher: Path, tmp_path: Path) -> None:
    """Other rows share the batches, so values move by rounding and no more, or were changed."""
    for teacher, cache in caches.items():
        report = verify_cache(small_cache_config(teacher, random_teacher, cache), 20)
        assert report.rows == 20 and report.positions > 200
        assert len(report.deviations) == 5 and report.largest < 2e-5
    cache = Path(shutil.copytree(caches["tiny-shared"], tmp_path / "c"))
    for unit in finished_units(cache):
        change_gold(cache, unit, slice(None), 256)
    report = verify_cache(small_cache_config("tiny-shared", random_teacher, cache), 200)
    assert report.deviations["log p of gold"].mean() == pytest.approx(0.5, abs=2e-3)
    assert report.deviations["logsumexp"].max() < 1e-5


def test_another_teacher_is_refused(caches: dict[str, Path], random_teacher: Path) -> None:
    for words, rows, teacher, folder in (
        ("teacher.weights", 5, TEACHER_TOKENIZER, caches["tiny-shared"]),
        ("is no cache", 5, random_teacher, random_teacher),
    ):
        with pytest.raises(TideError, match=words):
            verify_cache(small_cache_config("tiny-shared", teacher, folder), rows)


def test_damage_is_mended(caches: dict[str, Path], random_teacher: Path, tmp_path: Path) -> None:
    whole = caches["tiny-shared"]
    cache = Path(shutil.copytree(whole, tmp_path / "c"))
    assert not check_cache(cache).problems
    units = (Unit(0, 0), Unit(0, 1), Unit(1, 0), Unit(1, 1), Unit(7, 0))
    cut, spoiled, foreign, other_draw, stranger = (unit.path(cache) for unit in units)
    cut.write_bytes(cut.read_bytes()[:-50])
    change_gold(cache, Unit(0, 1), 3, -10_000)
    (cache / LEDGER).unlink()  # who changed it made the ledger anew
    shutil.copyfile(Unit(1, 0).path(caches["tiny-cross"]), foreign)
    shutil.copyfile(Unit(0, 1).path(whole), other_draw)
    stranger.parent.mkdir()
    shutil.copyfile(Unit(0, 1).path(whole), stranger)
    report = check_cache(cache)
    damaged = {cut, spoiled, foreign, other_draw, stranger, None}
    assert {problem.path for problem in report.problems} == damaged
    assert "gold_logp" in report.in_words()
    shutil.rmtree(stranger.parent)
    assert delete_damaged(report) == 5
    assert build_cache(small_cache_config("tiny-shared", random_teacher, cache)).computed == 4
    assert files(cache) == files(whole)


def test_inspection_adds_up(caches: dict[str, Path]) -> None:
    for teacher, cache in caches.items():
        sums = inspect_cache(cache)
        assert (len(sums.units), sums.rows) == (6, 48)
        assert sums.masked == sums.masked_by_t.sum() > 0
        assert sums.chunks == sums.likelihoods.sum() == sums.chunk_tokens.total() > 0
        assert (set(sums.chunk_tokens) == {(1, 1)}) == (teacher == "tiny-shared")
        assert 0 <= sums.mass <= 1.0001 * sums.positions
        size = sum(unit.path(cache).stat().st_size for unit in sums.units)
        assert 0.3 * size < sums.bytes_by_column.total() < size  # the rest is metadata
        assert f"{sums.masked:,} masked positions" in describe(sums)


@pytest.mark.parametrize("name", ["t", "student_ids", "masked", "topk_ranks", "teacher_masked"])
def test_who_reads_rows_refuses_what_no_row_can_be(
    name: str, caches: dict[str, Path], tmp_path: Path
) -> None:
    """With checksums, counts and a ledger that hold."""
    teacher = "tiny-cross" if name == "teacher_masked" else "tiny-shared"
    cache, unit = Path(shutil.copytree(caches[teacher], tmp_path / "c")), Unit(0, 0)
    column = read_table(unit.path(cache)).table.column(name)
    values = column.to_pylist()
    values[0] = float("nan") if name == "t" else [-1, *values[0][1:]]
    change_column(cache, unit, name, pa.array(values, column.type))
    (cache / LEDGER).unlink()
    for work in (lambda: inspect_cache(cache), lambda: find_row(cache, "0", 0),
                 lambda: prune_cache(cache, tmp_path / "p", k=2)):  # fmt: skip
        with pytest.raises(TideError, match=name):
            work()


@pytest.mark.parametrize("teacher", ["tiny-cross", "tiny-shared"])
def test_the_commands(caches: dict[str, Path], tmp_path: Path, teacher: str) -> None:
    def tide(*arguments: object) -> str:
        done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    cache = caches[teacher]
    row = next(r for r in rows_in(cache, Unit(1, 0)) if r.masked.size)
    shown = tide("inspect", cache, "--row", row.example_id, "--draw", 1)
    assert f"{row.masked.size} of" in shown
    assert "⟦A:" in shown or "⟦B:" in shown
    assert ("chunk: teacher's tokens" in shown) == (teacher == "tiny-cross")
    assert tide("inspect", cache, "--row", "0") != shown
    assert "masked positions" in tide("inspect", cache, "--picture", tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert "k 2" in tide("prune", cache, "--k", 2, "--out", tmp_path / "small")
    assert "files" in tide("pack", tmp_path / "small", tmp_path / "x.tar.zst")
    assert "files" in tide("unpack", tmp_path / "x.tar.zst", tmp_path / "y")
    assert "checksums" in tide("verify", "--cache", tmp_path / "y", "--rows", 0)
    assert "2 draws" in tide("merge", tmp_path / "small", tmp_path / "y", "--out", tmp_path / "z")
    assert files(tmp_path / "z") == files(tmp_path / "small")


def test_the_pages_example_reads_a_cache(caches: dict[str, Path]) -> None:
    """The example of docs/cache-format.md, as it stands there, gives the teacher of training."""
    cache = caches["tiny-shared"]
    text = (Path(__file__).parents[3] / "docs" / "cache-format.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("caches/tiny-shared", str(cache)), names)
    row = rows_in(cache, finished_units(cache)[0])[0]
    targets: Any = TargetReader(layout_of(cache), 4096)(collate([row], load_manifest(cache)))
    assert targets.topk.ids.shape[0]
    for which, temperature in enumerate((1.0, 2.0)):
        expected = torch.log_softmax(teacher_log_weights(targets.topk, temperature), 1)
        for i, logp in enumerate(expected):
            np.testing.assert_allclose(names["teacher"](i, which), logp, atol=1e-4)
