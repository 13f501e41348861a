import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit, finished_units, load_vocabulary
from shared.system.errors import TideError
from teacher_cache.maintenance.derive import merge_caches, prune_cache
from teacher_cache.maintenance.verify import check_cache, delete_damaged
from teacher_cache.run.build import build_cache
from tests.conftest import chats_file, files, small_cache_config
from tests.reading import all_rows, change_column, dataset, plain_table, rows_in, same_values


def ids_in(cache: Path) -> set[str]:
    """The examples of all shards."""
    return {row.example_id for unit in finished_units(cache) for row in rows_in(cache, unit)}


def test_a_pruned_cache_is_the_one_that_would_have_been_built_up_to_rounding(
    caches: dict[str, Path], random_teacher: Path, tmp_path: Path
) -> None:
    source, pruned, direct = caches["tiny-shared"], tmp_path / "pruned", tmp_path / "direct"
    targets = {"k": 3, "classes": 5, "pilot": 200}
    build_cache(
        small_cache_config(
            "tiny-shared", random_teacher, direct, noise={"draws": 1}, targets=targets
        )
    )
    prune_cache(source, pruned, k=3, draws=1)
    assert load_manifest(pruned).fingerprint.targets.k == 3
    ours, theirs = (load_vocabulary(cache) for cache in (pruned, direct))
    assert np.array_equal(ours.class_of, theirs.class_of)
    assert np.array_equal(ours.rank_of, theirs.rank_of)
    np.testing.assert_allclose(ours.prior, theirs.prior, rtol=1e-3, atol=1e-12)
    for a, b in zip(all_rows(pruned), all_rows(direct), strict=True):
        assert (
            a.topk_ids is not None
            and b.topk_ids is not None
            and a.topk_logp is not None
            and b.topk_logp is not None
        )
        assert np.array_equal(a.topk_ids, b.topk_ids)
        assert np.array_equal(a.topk_logp, b.topk_logp)
        assert a.tail_odds is not None and b.tail_odds is not None
        np.testing.assert_allclose(
            a.tail_odds, b.tail_odds, atol=0.06
        )  # a half step of the smallest p
        assert a.class_mass is not None and b.class_mass is not None
        assert np.abs(a.class_mass.astype(int) - b.class_mass.astype(int)).max(initial=0) <= 1
    assert not check_cache(pruned).problems
    before = files(pruned)
    (pruned / "draw=00" / "part-00001.parquet").unlink()  # interrupted
    prune_cache(source, pruned, k=3, draws=1)
    assert files(pruned) == before
    for asked in ({"k": 9}, {"k": 0}, {"draws": 3}, {"classes": 6}):
        with pytest.raises(TideError, match="expected: 1 to"):
            prune_cache(source, tmp_path / "more", **asked)
    with pytest.raises(TideError, match=r"targets.k: 3 → 2"):
        prune_cache(source, pruned, k=2, draws=1)


def test_fewer_draws_alone_change_no_byte(
    caches: dict[str, Path], random_teacher: Path, tmp_path: Path
) -> None:
    prune_cache(caches["tiny-shared"], tmp_path / "pruned", draws=1)
    build_cache(
        small_cache_config("tiny-shared", random_teacher, tmp_path / "direct", noise={"draws": 1})
    )
    assert files(tmp_path / "pruned") == files(tmp_path / "direct")
    shard = Unit(0, 0)
    assert (
        shard.path(tmp_path / "pruned").stat().st_ino
        == shard.path(caches["tiny-shared"]).stat().st_ino
    )  # a link


@pytest.mark.parametrize("values", ["levels", "float32"])
def test_fewer_classes_hold_the_same_mass(
    random_teacher: Path, tmp_path: Path, values: str
) -> None:
    targets = {"k": 4, "classes": 9, "pilot": 200, "values": values, "signals": ["topk"]}
    config = small_cache_config(
        "tiny-shared", random_teacher, tmp_path / "a", noise={"draws": 1}, targets=targets
    )
    build_cache(config)
    for classes in (3, 1):
        made = prune_cache(tmp_path / "a", tmp_path / f"c{classes}", classes=classes)
        assert made.fingerprint.targets.classes == classes
        assert not check_cache(tmp_path / f"c{classes}").problems
        for a, b in zip(all_rows(tmp_path / "a"), all_rows(tmp_path / f"c{classes}"), strict=True):
            assert a.tail_odds is not None and b.tail_odds is not None
            np.testing.assert_allclose(a.tail_odds, b.tail_odds, atol=0.01)
            assert (b.class_mass is None) == (classes == 1)


def test_adaptive_lists_are_pruned_to_what_fits(random_teacher: Path, tmp_path: Path) -> None:
    targets = {"k": 40, "mass": 0.004, "signals": ["topk"], "classes": 1, "pilot": 200}
    changes = {"noise": {"draws": 1}}
    build_cache(
        small_cache_config(
            "tiny-shared", random_teacher, tmp_path / "a", targets=targets, **changes
        )
    )
    build_cache(
        small_cache_config(
            "tiny-shared", random_teacher, tmp_path / "b", targets={**targets, "k": 12}, **changes
        )
    )
    prune_cache(tmp_path / "a", tmp_path / "c", k=12)
    for a, b in zip(all_rows(tmp_path / "c"), all_rows(tmp_path / "b"), strict=True):
        assert (
            a.topk_sizes is not None
            and b.topk_sizes is not None
            and a.topk_ids is not None
            and b.topk_ids is not None
        )
        assert np.array_equal(a.topk_sizes, b.topk_sizes) and np.array_equal(a.topk_ids, b.topk_ids)
        assert a.tail_odds is not None and b.tail_odds is not None
        np.testing.assert_allclose(
            a.tail_odds, b.tail_odds, atol=0.06
        )  # a half step of the smallest p
    sizes = np.concatenate(
        [r.topk_sizes for r in all_rows(tmp_path / "c") if r.topk_sizes is not None]
    )
    assert sizes.min() < 12


def test_parts_of_one_cache_merge_to_the_whole(caches: dict[str, Path], tmp_path: Path) -> None:
    whole = caches["tiny-cross"]
    for name, keep in (("a", 0), ("b", 1)):
        shutil.copytree(whole, tmp_path / name)
        for i, unit in enumerate(finished_units(whole)):
            if i % 2 != keep:
                unit.path(tmp_path / name).unlink()
    merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert files(tmp_path / "merged") == files(whole)


def test_caches_of_different_data_follow_each_other(random_teacher: Path, tmp_path: Path) -> None:
    lines = chats_file().read_text().splitlines()
    for name, part in (("a", lines[:10]), ("b", lines[10:24])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part) + "\n")
        targets = {
            "k": 8,
            "classes": 5,
            "pilot": 200,
            **({} if name == "a" else {"tables_from": tmp_path / "a"}),
        }
        config = {"data": {"source": str(tmp_path / f"{name}.jsonl")}, "targets": targets}
        build_cache(small_cache_config("tiny-shared", random_teacher, tmp_path / name, **config))
    merged = merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    assert (merged.parts, merged.examples) == (4, 24)
    assert not check_cache(tmp_path / "ab").problems
    ids = {
        r.example_id for u in finished_units(tmp_path / "ab") for r in rows_in(tmp_path / "ab", u)
    }
    ours = [{r.example_id for u in finished_units(tmp_path / n) for r in rows_in(tmp_path / n, u)}
            for n in "ab"]  # fmt: skip
    assert ids == ours[0] | ours[1]
    assert len(dataset(tmp_path / "ab", batch_size=4, epochs=1.0)) >= 6
    with pytest.raises(TideError, match="same data"):
        merge_caches([tmp_path / "a", tmp_path / "ab", tmp_path / "a"], tmp_path / "twice")
    prune_cache(tmp_path / "b", tmp_path / "b2", k=2)
    with pytest.raises(TideError, match=r"other settings[\s\S]*targets.k: 8 → 2"):
        merge_caches([tmp_path / "a", tmp_path / "b2"], tmp_path / "no")


def test_check_names_what_is_wrong_and_the_next_run_mends_it(
    caches: dict[str, Path], random_teacher: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(caches["tiny-shared"], tmp_path / "c"))
    assert not check_cache(cache).problems
    one, two, three, four = (Unit(0, 0).path(cache), Unit(0, 1).path(cache), Unit(1, 0).path(cache),
                             Unit(1, 1).path(cache))  # fmt: skip
    one.write_bytes(one.read_bytes()[:-50])
    column = plain_table(two).column("gold_logp_q").combine_chunks()
    spoiled = np.asarray(column.values).copy()
    spoiled[3] = -600
    change_column(cache, Unit(0, 1), "gold_logp_q", same_values(column, pa.array(spoiled)))
    (cache / "ledger.parquet").unlink()  # who changed it made the ledger anew
    shutil.copyfile(Unit(1, 0).path(caches["tiny-cross"]), three)  # of another cache
    shutil.copyfile(Unit(0, 1).path(caches["tiny-shared"]), four)  # of another draw
    (cache / "draw=07").mkdir()
    shutil.copyfile(Unit(0, 1).path(caches["tiny-shared"]), Unit(7, 0).path(cache))
    report = check_cache(cache)
    damaged = {problem.path for problem in report.problems}
    assert damaged == {one, two, three, four, None, Unit(7, 0).path(cache)}
    assert "gold_logp" in report.in_words()
    shutil.rmtree(cache / "draw=07")
    assert delete_damaged(report) == 5
    assert build_cache(small_cache_config("tiny-shared", random_teacher, cache)).computed == 4
    assert files(cache) == files(caches["tiny-shared"])


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


def test_ten_lines_of_polars_read_a_cache(caches: dict[str, Path]) -> None:
    """The example of docs/cache-format.md, as it stands there."""
    text = (Path(__file__).parents[3] / "docs" / "cache-format.md").read_text()
    code = (
        text.split("```python\n")[1]
        .split("```")[0]
        .replace("caches/tiny-shared", str(caches["tiny-shared"]))
    )
    names: dict[str, object] = {}
    exec(code, names)
    frame = names["top"]
    assert isinstance(frame, pl.DataFrame)
    unit = finished_units(caches["tiny-shared"])[0]
    rows = rows_in(caches["tiny-shared"], unit)
    expected = np.concatenate([r.topk_ids for r in rows if r.topk_ids is not None])
    assert frame["id"].to_list() == expected.tolist()
    assert frame["logp"].max() <= 0  # type: ignore[operator]
