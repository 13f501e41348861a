import dataclasses
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
from tests.reading import dataset as batches
from tests.reading import layout_of, rows_in


def dataset(cache: Path, **changes: object) -> BatchDataset:
    return batches(cache, **{"window": 2, **changes})


def test_an_epoch_sees_every_row_of_its_draw_once_in_whole_batches(caches: dict[str, Path]) -> None:
    for batch, window in ((3, 1), (5, 2), (100, 9)):
        data = dataset(caches["tiny-cross"], batch_size=batch, window=window)
        index = 0
        for epoch in range(3):
            items = [data.rows(i) for i in range(index, index + data.batches_in(epoch))]
            index += len(items)
            assert [len(rows) for rows in items[:-1]] == [batch] * (len(items) - 1)
            assert {row.draw for rows in items for row in rows} == {epoch % 2}
            seen = Counter(row.example_id for rows in items for row in rows)
            assert set(seen.values()) == {1} and seen.total() == 24


def test_batches_hold_rows_of_like_length(caches: dict[str, Path]) -> None:
    data = dataset(caches["tiny-cross"], batch_size=4, window=3)
    tokens = padded = 0
    for i in range(data.batches_in(0)):
        lengths = [len(row.student_ids) for row in data.rows(i)]
        tokens += sum(lengths)
        padded += max(lengths) * len(lengths)
    assert padded < 1.25 * tokens


def test_the_order_is_a_function_of_the_seed_alone(caches: dict[str, Path]) -> None:
    def order(seed: int, indices: list[int]) -> list[list[str]]:
        data = dataset(caches["tiny-cross"], seed=seed)
        return [[row.example_id for row in data.rows(i)] for i in indices]

    everything = list(range(len(dataset(caches["tiny-cross"]))))
    whole = order(3, everything)
    assert order(3, everything[7:]) == whole[7:]  # resuming in the middle
    assert whole != order(4, everything)
    first = dataset(caches["tiny-cross"]).batches_in(0)
    assert whole[:first] != whole[2 * first : 3 * first]  # epochs 0 and 2 share a draw


@pytest.mark.parametrize("teacher", ["tiny-cross", "tiny-shared"])
def test_a_batch_says_what_its_rows_say(caches: dict[str, Path], teacher: str) -> None:
    cache = caches[teacher]
    manifest = load_manifest(cache)
    rows = rows_in(cache, Unit(0, 0))
    batch = collate(rows, manifest)
    n = 0
    for i, row in enumerate(rows):
        length, part = len(row.student_ids), slice(n, n + row.masked.size)
        noised = row.student_ids.copy()
        noised[row.masked] = manifest.fingerprint.student.mask_id
        assert batch["valid"][i].sum() == length
        assert batch["clean"][i, :length].tolist() == row.student_ids.tolist()
        assert batch["noised"][i, :length].tolist() == noised.tolist()
        assert batch["column"][part].tolist() == row.masked.tolist()
        assert batch["gold"][part].tolist() == row.student_ids[row.masked].tolist()
        assert torch.allclose(batch["t"][part], torch.tensor(row.t))
        n += row.masked.size
    counts = counts_of(batch["counts"])
    assert (int(counts.read), int(counts.maskable)) == (n, sum(r.maskable for r in rows))
    targets = TargetReader(manifest, layout_of(cache))(batch)
    # Every chunk token is found at its own masked row, with its own gold id.
    gold, chunk_logp = [], []
    for row in rows:
        assert row.chunk_student is not None and row.chunk_logp is not None
        chunk_logp += row.chunk_logp.tolist()
        for start, end in row.chunk_student:
            gold += row.student_ids[start:end].tolist()
    assert targets.chunks is not None
    assert batch["gold"][targets.chunks.rows].tolist() == gold
    assert targets.chunks.teacher_logp.tolist() == chunk_logp
    assert (targets.topk is None) == (teacher == "tiny-cross")
    if targets.topk is not None:
        ids = np.concatenate([r.topk_ids for r in rows if r.topk_ids is not None])
        assert targets.topk.ids[targets.topk.kept].tolist() == ids.tolist()
        odds = np.concatenate([r.tail_odds for r in rows if r.tail_odds is not None])
        assert targets.topk.odds[2.0].tolist() == odds[:, 1].tolist()
        assert targets.topk.class_mass is not None
        tail = torch.sigmoid(targets.topk.odds[2.0])
        torch.testing.assert_close(targets.topk.class_mass[2.0].exp().sum(1), tail)


def test_lists_of_different_lengths_are_padded_with_a_repeated_id(caches: dict[str, Path]) -> None:
    cache = caches["tiny-shared"]
    row = next(r for r in rows_in(cache, Unit(0, 0)) if r.masked.size >= 3)
    assert row.topk_ids is not None and row.topk_logp is not None
    ids, logp = row.topk_ids.reshape(-1, 8), row.topk_logp.reshape(-1, 8)
    sizes = np.full(row.masked.size, 8, np.int32)
    sizes[1] = 2
    keep = np.arange(8) < sizes[:, None]
    kept = {"topk_sizes": sizes, "topk_ids": ids[keep], "topk_logp": logp[keep]}
    batch = collate([dataclasses.replace(row, **kept)], load_manifest(cache))
    assert batch["topk_kept"].sum(1).tolist() == sizes.tolist()
    assert (batch["topk_ids"][1, 2:] == int(ids[1, 0])).all()
    assert batch["topk_ids"][2].tolist() == ids[2].tolist()


def test_a_cache_that_is_not_whole_is_refused(caches: dict[str, Path], tmp_path: Path) -> None:
    cache = Path(shutil.copytree(caches["tiny-cross"], tmp_path / "c"))
    shard = Unit(1, 2).path(cache)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(TideError, match=shard.name):
        dataset(cache)
