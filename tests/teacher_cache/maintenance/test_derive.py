"""Pruned and merged caches hold what a cache that was built so holds."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.cache.row import CacheRow
from shared.cache.shards import Unit, finished_units, load_vocabulary
from shared.system.files import TideError
from teacher_cache.maintenance.derive import merge_caches, prune_cache
from teacher_cache.maintenance.verify import check_cache
from teacher_cache.run.build import build_cache
from tests.conftest import chats_file, files, small_cache_config
from tests.reading import all_rows, dataset


def build(model: Path, out: Path, draws: int = 1, data: Any = None, **targets: object) -> Path:
    """A cache of the teacher of the student's tokens; its folder."""
    changes: dict[str, object] = {} if data is None else {"data": data}
    changes["targets"] = {"k": 8, "classes": 5, "pilot": 200, **targets}
    changes["noise"] = {"draws": draws}
    build_cache(small_cache_config("tiny-shared", model, out, **changes))
    return out


def assert_alike(ours: CacheRow, theirs: CacheRow) -> None:
    """The same lists, and the same tail up to half a step of the smallest p."""
    for name in ("topk_sizes", "topk_ids", "topk_logp"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name))
    assert ours.tail_odds is not None and theirs.tail_odds is not None
    np.testing.assert_allclose(ours.tail_odds, theirs.tail_odds, atol=0.06)


def test_pruned_is_as_built(caches: dict[str, Path], random_teacher: Path, tmp_path: Path) -> None:
    """Up to rounding; fewer draws alone change no byte."""
    source, pruned = caches["tiny-shared"], tmp_path / "pruned"
    direct = build(random_teacher, tmp_path / "direct", k=3)
    shutil.copytree(source / "student_tokenizer", pruned / "student_tokenizer")  # killed there
    assert prune_cache(source, pruned, k=3, draws=1).fingerprint.targets.k == 3
    ours, theirs = load_vocabulary(pruned), load_vocabulary(direct)
    assert np.array_equal(ours.class_of, theirs.class_of)
    assert np.array_equal(ours.rank_of, theirs.rank_of)
    np.testing.assert_allclose(ours.prior, theirs.prior, rtol=1e-3, atol=1e-12)
    for a, b in zip(all_rows(pruned), all_rows(direct), strict=True):
        assert_alike(a, b)
        assert a.class_mass is not None and b.class_mass is not None
        assert np.abs(a.class_mass.astype(int) - b.class_mass.astype(int)).max(initial=0) <= 1
    assert not check_cache(pruned).problems
    before = files(pruned)
    Unit(0, 1).path(pruned).unlink()  # interrupted
    prune_cache(source, pruned, k=3, draws=1)
    assert files(pruned) == before
    for asked in ({"k": 9}, {"k": 0}, {"draws": 3}, {"classes": 6}):
        with pytest.raises(TideError):
            prune_cache(source, tmp_path / "more", **asked)
    with pytest.raises(TideError, match=r"targets.k: 3 → 2"):
        prune_cache(source, pruned, k=2, draws=1)
    prune_cache(source, tmp_path / "one", draws=1)
    assert files(tmp_path / "one") == files(build(random_teacher, tmp_path / "direct-one"))
    unit = Unit(0, 0)
    assert unit.path(tmp_path / "one").samefile(unit.path(source))  # a link


@pytest.mark.parametrize("values", ["levels", "float32"])
def test_fewer_classes_hold_as_much(random_teacher: Path, tmp_path: Path, values: str) -> None:
    source = build(random_teacher, tmp_path / "a", k=4, classes=9, values=values, signals=["topk"])
    for classes in (3, 1):
        pruned = tmp_path / f"c{classes}"
        made = prune_cache(source, pruned, classes=classes)
        assert made.fingerprint.targets.classes == classes and not check_cache(pruned).problems
        for a, b in zip(all_rows(source), all_rows(pruned), strict=True):
            assert a.tail_odds is not None and b.tail_odds is not None
            np.testing.assert_allclose(a.tail_odds, b.tail_odds, atol=0.01)
            assert (b.class_mass is None) == (classes == 1)


def test_adaptive_lists_are_pruned_to_what_fits(random_teacher: Path, tmp_path: Path) -> None:
    targets = {"mass": 0.004, "signals": ["topk"], "classes": 1}
    source = build(random_teacher, tmp_path / "a", **targets, k=40)
    direct = build(random_teacher, tmp_path / "b", **targets, k=12)
    prune_cache(source, tmp_path / "c", k=12)
    sizes = []
    for a, b in zip(all_rows(tmp_path / "c"), all_rows(direct), strict=True):
        assert_alike(a, b)
        assert a.topk_sizes is not None
        sizes += a.topk_sizes.tolist()
    assert min(sizes) < 12


def test_parts_of_one_cache_merge_to_the_whole(caches: dict[str, Path], tmp_path: Path) -> None:
    whole = caches["tiny-cross"]
    for name, drop in (("a", 0), ("b", 1)):
        shutil.copytree(whole, tmp_path / name)
        for unit in finished_units(whole)[drop::2]:
            unit.path(tmp_path / name).unlink()
    merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert files(tmp_path / "merged") == files(whole)


def test_caches_of_different_data_follow_each_other(random_teacher: Path, tmp_path: Path) -> None:
    a, b, both = tmp_path / "a", tmp_path / "b", tmp_path / "ab"
    lines = chats_file().read_text().splitlines()
    for cache, part in ((a, lines[:10]), (b, lines[10:24])):
        source = tmp_path / f"{cache.name}.jsonl"
        source.write_text("\n".join(part) + "\n")
        tables = {} if cache == a else {"tables_from": a}
        build(random_teacher, cache, 2, {"source": str(source)}, **tables)
    merged = merge_caches([a, b], both)
    assert (merged.parts, merged.examples) == (4, 24)
    assert not check_cache(both).problems
    ids = [{row.example_id for row in all_rows(cache)} for cache in (a, b, both)]
    assert ids[2] == ids[0] | ids[1]
    assert len(dataset(both, batch_size=4, epochs=1.0)) >= 6
    with pytest.raises(TideError):  # the same data twice
        merge_caches([a, both, a], tmp_path / "twice")
    prune_cache(b, tmp_path / "b2", k=2)
    with pytest.raises(TideError, match=r"targets.k: 8 → 2"):
        merge_caches([a, tmp_path / "b2"], tmp_path / "no")
