from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.errors import TideError
from shared.manifest import load_manifest
from shared.shards import Unit, read_shard
from student_train.batches.collate import collate, counts_of, targets_of
from student_train.batches.loader import BatchDataset


def dataset(cache: Path, **changes: object) -> BatchDataset:
    arguments: dict = {"batch_size": 5, "seed": 3, "epochs": 4.0, "window_parts": 2, **changes}
    return BatchDataset(cache, load_manifest(cache), **arguments)


def test_an_epoch_trains_on_its_draw_and_sees_every_row_once(caches: dict[str, Path]) -> None:
    data = dataset(caches["tiny-cross"])
    index = 0
    for epoch in range(4):
        rows = [row for i in range(index, index + data.batches_in(epoch)) for row in data.rows(i)]
        index += data.batches_in(epoch)
        assert {row.draw for row in rows} == {epoch % 2}
        assert set(Counter(row.example_id for row in rows).values()) == {1}
        expected = sum(len(read_shard(Unit(epoch % 2, p).path(caches["tiny-cross"]), (1.0, 2.0))) for p in range(3))
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
    assert order(3, everything[:first]) != order(3, everything[2 * first : 3 * first])  # epochs 0 and 2 share a draw


@pytest.mark.parametrize("teacher", ["tiny-cross", "tiny-shared"])
def test_a_batch_says_what_its_rows_say(caches: dict[str, Path], teacher: str) -> None:
    cache = caches[teacher]
    manifest = load_manifest(cache)
    rows = list(read_shard(Unit(0, 0).path(cache), (1.0, 2.0)))
    batch = collate(rows, manifest)
    mask_id = manifest.fingerprint["student"]["mask_id"]
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
    assert int(counts.masked) == n
    assert int(counts.maskable) == sum(r.maskable for r in rows)
    targets = targets_of(batch, manifest.temperatures)
    assert targets.chunks is not None
    # Every chunk token is found at its own masked row, with its own gold id.
    expected = [i for r in rows if r.chunk_student is not None for a, b in r.chunk_student for i in r.student_ids[a:b]]
    assert batch["gold"][targets.chunks.rows].tolist() == expected
    chunk_logp = np.concatenate([r.chunk_logp for r in rows if r.chunk_logp is not None])
    assert targets.chunks.teacher_logp.tolist() == chunk_logp.tolist()
    assert (targets.topk is None) == (teacher == "tiny-cross")
    if targets.topk is not None:
        flat = np.concatenate([r.topk_ids for r in rows if r.topk_ids is not None])
        assert targets.topk.ids[targets.topk.kept].tolist() == flat.tolist()
        lse = np.concatenate([r.logsumexp for r in rows])
        assert targets.topk.logsumexp[2.0].tolist() == lse[:, 1].tolist()


def test_lists_of_different_lengths_are_padded_with_a_repeated_id(caches: dict[str, Path]) -> None:
    import dataclasses

    cache = caches["tiny-shared"]
    row = next(r for r in read_shard(Unit(0, 0).path(cache), (1.0, 2.0)) if r.masked.size >= 3)
    assert row.topk_ids is not None
    assert row.topk_logits is not None
    sizes = np.full(row.masked.size, 8, np.int32)
    sizes[1] = 2
    keep = np.arange(8) < sizes[:, None]
    shorter = dataclasses.replace(
        row,
        topk_sizes=sizes,
        topk_ids=row.topk_ids.reshape(-1, 8)[keep],
        topk_logits=row.topk_logits.reshape(-1, 8)[keep],
    )
    batch = collate([shorter], load_manifest(cache))
    assert batch["topk_kept"].sum(1).tolist() == sizes.tolist()
    ids = batch["topk_ids"]
    assert (ids[1, 2:] == ids[1, 0]).all()
    assert ids[2].tolist() == row.topk_ids.reshape(-1, 8)[2].tolist()


def test_batches_hold_rows_of_like_length(caches: dict[str, Path]) -> None:
    data = dataset(caches["tiny-cross"], batch_size=4, window_parts=3)
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
    with pytest.raises(TideError, match=r"part-00002.parquet cannot be read[\s\S]*delete this file"):
        dataset(cache)
    shard.unlink()
    with pytest.raises(TideError, match="lacks 1 of 6 shards"):
        dataset(cache)
    with pytest.raises(TideError, match="is no cache"):
        load_manifest(tmp_path)
