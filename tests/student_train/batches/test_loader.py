from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit
from shared.system.errors import TideError
from student_train.batches.collate import TargetReader, collate, counts_of
from student_train.batches.loader import BatchDataset
from student_train.batches.open_cache import OpenCache
from tests.reading import dataset as batches
from tests.reading import layout_of, rows_in


def dataset(cache: Path, **changes: object) -> BatchDataset:
    return batches(cache, **{"window": 2, **changes})


def test_an_epoch_trains_on_its_draw_and_sees_every_row_once(caches: dict[str, Path]) -> None:
    data = dataset(caches["tiny-cross"])
    index = 0
    for epoch in range(4):
        rows = [row for i in range(index, index + data.batches_in(epoch)) for row in data.rows(i)]
        index += data.batches_in(epoch)
        assert {row.draw for row in rows} == {epoch % 2}
        assert set(Counter(row.example_id for row in rows).values()) == {1}
        expected = sum(len(rows_in(caches["tiny-cross"], Unit(epoch % 2, p))) for p in range(3))
        assert len(rows) == expected


def test_the_order_is_a_function_of_the_seed_alone(caches: dict[str, Path]) -> None:
    def order(seed: int, indices: list[int]) -> list[list[str]]:
        data = dataset(caches["tiny-cross"], seed=seed)
        return [[row.example_id for row in data.rows(i)] for i in indices]

    everything = list(range(len(dataset(caches["tiny-cross"]))))
    assert order(3, everything) == order(3, everything)
    assert order(3, everything[7:]) == order(3, everything)[7:]  # resuming in the middle
    assert order(3, everything) != order(4, everything)
    first = dataset(caches["tiny-cross"]).batches_in(0)
    assert order(3, everything[:first]) != order(
        3, everything[2 * first : 3 * first]
    )  # epochs 0 and 2 share a draw


@pytest.mark.parametrize("teacher", ["tiny-cross", "tiny-shared"])
def test_a_batch_says_what_its_rows_say(caches: dict[str, Path], teacher: str) -> None:
    cache = caches[teacher]
    manifest = load_manifest(cache)
    rows = list(rows_in(cache, Unit(0, 0)))
    batch = collate(rows, manifest)
    mask_id = manifest.fingerprint.student.mask_id
    n = 0
    for i, row in enumerate(rows):
        length = len(row.student_ids)
        assert batch["clean"][i, :length].tolist() == row.student_ids.tolist()
        assert batch["valid"][i].sum() == length
        noised = row.student_ids.copy()
        noised[row.masked] = mask_id
        assert batch["noised"][i, :length].tolist() == noised.tolist()
        part = slice(n, n + row.masked.size)
        assert batch["column"][part].tolist() == row.masked.tolist()
        assert batch["gold"][part].tolist() == row.student_ids[row.masked].tolist()
        assert torch.allclose(batch["t"][part], torch.tensor(row.t))
        n += row.masked.size
    counts = counts_of(batch["counts"])
    assert int(counts.read) == n
    assert int(counts.maskable) == sum(r.maskable for r in rows)
    targets = TargetReader(manifest, layout_of(cache))(batch)
    assert targets.chunks is not None
    # Every chunk token is found at its own masked row, with its own gold id.
    expected = [
        i
        for r in rows
        if r.chunk_student is not None
        for a, b in r.chunk_student
        for i in r.student_ids[a:b]
    ]
    assert batch["gold"][targets.chunks.rows].tolist() == expected
    chunk_logp = np.concatenate([r.chunk_logp for r in rows if r.chunk_logp is not None])
    assert targets.chunks.teacher_logp.tolist() == chunk_logp.tolist()
    assert (targets.topk is None) == (teacher == "tiny-cross")
    if targets.topk is not None:
        flat = np.concatenate([r.topk_ids for r in rows if r.topk_ids is not None])
        assert targets.topk.ids[targets.topk.kept].tolist() == flat.tolist()
        odds = np.concatenate([r.tail_odds for r in rows if r.tail_odds is not None])
        assert targets.topk.odds[2.0].tolist() == odds[:, 1].tolist()
        assert targets.topk.class_mass is not None and targets.topk.classes is not None
        assert targets.topk.classes.count == 5
        tail = torch.sigmoid(targets.topk.odds[2.0])
        torch.testing.assert_close(targets.topk.class_mass[2.0].exp().sum(1), tail)


def test_lists_of_different_lengths_are_padded_with_a_repeated_id(caches: dict[str, Path]) -> None:
    import dataclasses

    cache = caches["tiny-shared"]
    row = next(r for r in rows_in(cache, Unit(0, 0)) if r.masked.size >= 3)
    assert row.topk_ids is not None
    assert row.topk_logp is not None
    sizes = np.full(row.masked.size, 8, np.int32)
    sizes[1] = 2
    keep = np.arange(8) < sizes[:, None]
    shorter = dataclasses.replace(
        row,
        topk_sizes=sizes,
        topk_ids=row.topk_ids.reshape(-1, 8)[keep],
        topk_logp=row.topk_logp.reshape(-1, 8)[keep],
    )
    batch = collate([shorter], load_manifest(cache))
    assert batch["topk_kept"].sum(1).tolist() == sizes.tolist()
    ids = batch["topk_ids"]
    assert (ids[1, 2:] == ids[1, 0]).all()
    assert ids[2].tolist() == row.topk_ids.reshape(-1, 8)[2].tolist()


def test_an_epoch_is_found_by_its_number_alone(
    caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of earlier epochs is opened."""
    data = dataset(caches["tiny-cross"], batch_size=7, epochs=400.0)
    assert data.batches_in(0) * 400 == len(data)
    opened: list[Unit] = []
    shard = OpenCache.shard
    monkeypatch.setattr(OpenCache, "shard", lambda self, u: (opened.append(u), shard(self, u))[1])
    assert {row.draw for row in data.rows(len(data) - 1)} == {1}
    assert len(opened) <= 2 and {unit.draw for unit in opened} == {1}


@pytest.mark.parametrize("batch", [3, 5, 7, 100])
@pytest.mark.parametrize("window", [1, 2, 9])
def test_batches_are_whole_but_the_last_across_windows(
    caches: dict[str, Path], batch: int, window: int
) -> None:
    data = dataset(caches["tiny-cross"], batch_size=batch, window=window)
    sizes = [len(data.rows(i)) for i in range(data.batches_in(0))]
    rows = sum(sizes)
    assert sizes[:-1] == [batch] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= batch and rows == data.totals["rows"] // 2


def test_batches_hold_rows_of_like_length(caches: dict[str, Path]) -> None:
    data = dataset(caches["tiny-cross"], batch_size=4, window=3)
    tokens = padded = 0
    for i in range(data.batches_in(0)):
        lengths = [len(row.student_ids) for row in data.rows(i)]
        tokens, padded = tokens + sum(lengths), padded + max(lengths) * len(lengths)
    assert padded < 1.25 * tokens


def test_a_cache_that_is_not_whole_is_refused(caches: dict[str, Path], tmp_path: Path) -> None:
    cache = Path(shutil.copytree(caches["tiny-cross"], tmp_path / "c"))
    shard = Unit(1, 2).path(cache)
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        TideError, match=r"part-00002.parquet is not what the cache's ledger says[\s\S]*tide verify"
    ):
        dataset(cache)
    shard.unlink()
    with pytest.raises(TideError, match="lacks 1 of 6 shards"):
        dataset(cache)
    with pytest.raises(TideError, match="is no cache"):
        load_manifest(tmp_path)
