"""Pruned and merged caches hold what a cache that was built so holds."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.cache.row import CacheRow
from shared.cache.shards import Unit, finished_units
from shared.cache.tail import LinearTail
from shared.system.files import TideError
from teacher_cache.maintenance.derive import merge_caches, prune_cache
from teacher_cache.maintenance.verify import check_cache
from teacher_cache.run.build import build_cache
from tests.conftest import chats_file, files, small_cache_config
from tests.reading import all_rows, dataset, layout_of


def build(model: Path, out: Path, draws: int = 1, data: Any = None, **targets: object) -> Path:
    """A cache of the teacher of the student's tokens; its folder."""
    changes: dict[str, object] = {} if data is None else {"data": data}
    changes["targets"] = {"k": 8, "rank": 6, "pilot": 200, **targets}
    changes["noise"] = {"draws": draws}
    build_cache(small_cache_config("tiny-shared", model, out, **changes))
    return out


def assert_same_lists(ours: CacheRow, theirs: CacheRow) -> None:
    for name in ("topk_sizes", "topk_ids", "topk_logp"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name))


def weights_outside(cache: Path, row: Any, listed: Tensor, temperature: float) -> Tensor:
    """log Σ exp(x_T + L_T) over the ids that are not listed, in float64."""
    layout: Any = layout_of(cache)
    tail = LinearTail.of(layout.tables, (1.0, 2.0))
    code = torch.tensor(row.tail_code.astype(np.float32)) * (layout.tables.step or 1.0)
    x = tail.at(code, temperature).double().scatter(1, listed, -torch.inf)
    return torch.logsumexp(x, 1) + torch.tensor(row.tail_level[:, round(temperature) - 1])


def test_pruned_is_as_built(caches: dict[str, Path], random_teacher: Path, tmp_path: Path) -> None:
    """Up to rounding; fewer draws alone change no byte."""
    source, pruned = caches["tiny-shared"], tmp_path / "pruned"
    direct = build(random_teacher, tmp_path / "direct", k=3)
    shutil.copytree(source / "student_tokenizer", pruned / "student_tokenizer")  # killed there
    assert prune_cache(source, pruned, k=3, draws=1).fingerprint.targets.k == 3
    for a, b in zip(all_rows(pruned), all_rows(direct), strict=True):
        assert_same_lists(a, b)
    assert not check_cache(pruned).problems
    before = files(pruned)
    Unit(0, 1).path(pruned).unlink()  # interrupted
    prune_cache(source, pruned, k=3, draws=1)
    assert files(pruned) == before
    for asked in ({"k": 9}, {"k": 0}, {"draws": 3}, {"rank": 7}):
        with pytest.raises(TideError):
            prune_cache(source, tmp_path / "more", **asked)
    with pytest.raises(TideError, match=r"targets.k: 3 → 2"):
        prune_cache(source, pruned, k=2, draws=1)
    prune_cache(source, tmp_path / "one", draws=1)
    assert files(tmp_path / "one") == files(build(random_teacher, tmp_path / "direct-one"))
    unit = Unit(0, 0)
    assert unit.path(tmp_path / "one").samefile(unit.path(source))  # a link


@pytest.mark.parametrize("values", ["levels", "float32"])
def test_what_leaves_joins_the_tail(random_teacher: Path, tmp_path: Path, values: str) -> None:
    """The tail's weight in the pruned cache is the old one and that of the entries that left."""
    source = build(random_teacher, tmp_path / "a", k=4, rank=9, values=values, signals=["topk"])
    for k, rank in ((4, 3), (1, 9), (2, 1)):
        pruned = tmp_path / f"k{k}-r{rank}"
        prune_cache(source, pruned, k=k, rank=rank)
        assert not check_cache(pruned).problems and layout_of(pruned).rank == rank
        rows: Any = zip(all_rows(source), all_rows(pruned), strict=True)
        for a, b in rows:
            ids = torch.tensor(a.topk_ids.reshape(-1, 4)).long()
            logp = torch.tensor(a.topk_logp.reshape(-1, 4)).double()
            assert np.array_equal(b.tail_code, a.tail_code[:, :rank])
            for t in (1.0, 2.0):
                before = weights_outside(source, a, ids, t)
                left = torch.logsumexp(logp[:, k:] / t, 1)
                after = weights_outside(pruned, b, ids[:, :k], t)
                torch.testing.assert_close(after, before.logaddexp(left), rtol=0, atol=5e-3)


def test_adaptive_lists_are_pruned_to_what_fits(random_teacher: Path, tmp_path: Path) -> None:
    targets = {"mass": 0.004, "signals": ["topk"], "rank": 1}
    source = build(random_teacher, tmp_path / "a", **targets, k=40)
    direct = build(random_teacher, tmp_path / "b", **targets, k=12)
    prune_cache(source, tmp_path / "c", k=12)
    sizes = []
    for a, b in zip(all_rows(tmp_path / "c"), all_rows(direct), strict=True):
        assert_same_lists(a, b)
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
