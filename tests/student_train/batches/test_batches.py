"""Which rows come at which step, from a folder or a store, and how they stand in a batch."""

import dataclasses
import pickle
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.cache.ledger import LEDGER, Entry, settle_ledger
from shared.cache.manifest import load_manifest
from shared.cache.shards import Shard, Unit, finished_units
from shared.cache.stores import Store
from shared.settings.config import TrainConfig
from shared.system.files import TideError
from student_train.batches.collate import (
    TargetReader,
    collate,
    counts_of,
    pack,
    padding_of,
    places_of_draws,
)
from student_train.batches.loader import BatchDataset, OpenCache
from student_train.model import masked_hidden
from tests.reading import change_column, dataset, layout_of, plain_table, rows_in
from tests.student_train.places import all_places, in_float64, small


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
    # Several draws a step: epochs count draws.
    data = dataset(caches["tiny-cross"], 2, draws_per_step=2, batch_size=4, epochs=2.0, window=2)
    assert data.batches_in(0) * 2 == len(data)  # one pass over two draws: two epochs
    rows = [row for i in range(len(data)) for row in data.rows(i)]
    assert [row.draw for row in rows] == [0, 1] * 24
    assert len({(row.example_id, row.draw) for row in rows}) == 48


def test_the_order_is_the_seeds_and_like_lengths_come_together(caches: dict[str, Path]) -> None:
    def order(seed: int, first: int = 0) -> list[list[str]]:
        data = dataset(caches["tiny-cross"], seed=seed, window=2)
        return [[row.example_id for row in data.rows(i)] for i in range(first, len(data))]

    whole = order(3)
    assert order(3, 7) == whole[7:]  # resuming in the middle
    assert whole != order(4)
    assert whole[:5] != whole[10:15]  # epochs 0 and 2 share a draw
    data = dataset(caches["tiny-cross"], batch_size=4, window=3)
    batches = [[len(row.student_ids) for row in data.rows(i)] for i in range(6)]
    assert sum(max(batch) * len(batch) for batch in batches) < 1.25 * sum(map(sum, batches))


def test_only_own_rows_are_read(caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, rows = [], Shard.rows
    monkeypatch.setattr(Shard, "rows", lambda *a: decoded.append(len(a[3])) or rows(*a))
    data = dataset(caches["tiny-shared"], 4, batch_size=2)
    for i in range(data.batches_in(0)):
        data.rows(4 * i)
    assert sum(decoded) == 6


def test_draws_of_other_examples_are_refused(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other examples as in a cache whose ledger says the same."""
    cache = Path(shutil.copytree(caches["tiny-cross"], tmp_path / "c"))
    data, shard = dataset(cache, draws_per_step=2, batch_size=4), Unit(1, 1).path(cache)
    names = plain_table(shard).column("example_id").combine_chunks()
    change_column(cache, Unit(1, 1), "example_id", names.take(list(range(len(names)))[::-1]))
    monkeypatch.setattr(Entry, "check", lambda *_: None)
    with pytest.raises(TideError, match=shard.name):
        [data.rows(i) for i in range(len(data))]


# --- From a store: shards come ahead of their use, and a bounded number of them stays ----------


def test_a_store_gives_the_rows_of_a_folder(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, there, local = caches["tiny-shared"], tmp_path / "store", tmp_path / "local"
    manifest, fetched, read = load_manifest(cache), [], Store.read
    Store.open(str(there)).push(cache, manifest, settle_ledger(cache, manifest))

    def noted(self: Store, name: str) -> bytes:
        fetched.extend([name] if name.endswith(".parquet") and "part-" in name else [])
        return read(self, name)

    def opened(folder: Path, size: float = 1.0) -> OpenCache:
        return OpenCache(TrainConfig(cache=folder, store=str(there), store_cache_gb=size))

    monkeypatch.setattr(Store, "read", noted)
    how = TrainConfig(batch_size=5, seed=3, epochs=4.0, window=2)
    data, expected = BatchDataset(opened(local), how), dataset(cache, window=2)
    assert finished_units(local) == []  # nothing is pulled before it is needed
    assert len(data) == len(expected)
    for i in range(len(data)):
        assert [r.example_id for r in data.rows(i)] == [r.example_id for r in expected.rows(i)]
    assert len(fetched) == 6  # each once, in four epochs
    bounded = BatchDataset(opened(tmp_path / "small", 1e-6), how)
    fetched.clear()
    for i in range(len(bounded)):
        assert bounded.rows(i)
        assert len(finished_units(tmp_path / "small")) <= 5  # those in use, and on their way
    assert len(fetched) > 6
    # What is there is not fetched, what is damaged is.
    again = pickle.loads(pickle.dumps(opened(local)))  # to a loader's process
    path = Unit(0, 1).path(local)
    path.write_bytes(path.read_bytes()[:-3])
    fetched.clear()
    for unit, fetches in ((Unit(0, 0), 0), (Unit(0, 1), 1)):
        assert again.shard(unit).counts["rows"] == again.ledger[unit].rows
        assert len(fetched) == fetches
    # In the store itself: another shard, a missing one, no ledger.
    again = opened(tmp_path / "empty")
    shutil.copyfile(Unit(1, 0).path(there), Unit(1, 2).path(there))
    Unit(1, 0).path(there).unlink()
    for unit in (Unit(1, 2), Unit(1, 0)):
        with pytest.raises(TideError, match=f"part-0000{unit.part}"):
            again.shard(unit)
    (there / LEDGER).unlink()
    with pytest.raises(TideError, match=LEDGER):
        opened(tmp_path / "other")


# --- Rows as tensors ------------------------------------------------------------------------------


def test_a_batch_says_what_its_rows_say(caches: dict[str, Path]) -> None:
    cache, manifest, n = caches["tiny-shared"], load_manifest(caches["tiny-shared"]), 0
    rows: list[Any] = rows_in(cache, Unit(0, 0))
    batch = collate(rows, manifest)
    for i, row in enumerate(rows):
        length, part = len(row.student_ids), slice(n, n + row.masked.size)
        noised = row.student_ids.copy()
        noised[row.masked] = manifest.fingerprint.student.mask_id
        assert batch["clean"][i, :length].tolist() == row.student_ids.tolist()
        assert batch["noised"][i, :length].tolist() == noised.tolist()
        assert batch["column"][part].tolist() == row.masked.tolist()
        assert batch["gold"][part].tolist() == row.student_ids[row.masked].tolist()
        assert torch.allclose(batch["t"][part], torch.tensor(row.t))
        n += row.masked.size
    counts = counts_of(batch["counts"])
    assert (int(counts.read), int(counts.maskable)) == (n, sum(r.maskable for r in rows))
    targets: Any = TargetReader(layout_of(cache), 4100)(batch)
    ids = np.concatenate([r.topk_ids for r in rows])
    assert targets.topk.ids[targets.topk.kept].tolist() == ids.tolist()
    level = np.concatenate([r.tail_level for r in rows])
    assert targets.topk.level[2.0].tolist() == level[:, 1].tolist()
    code = np.concatenate([r.tail_code for r in rows]).astype(np.float32) * np.float32(0.04)
    assert targets.topk.code.tolist() == code.tolist()
    # A student of more rows than the teacher has ids shares none of the others.
    assert targets.topk.tail.unshared.nonzero().flatten().tolist() == [4096, 4097, 4098, 4099]


def test_lists_of_different_lengths_are_padded_with_a_repeated_id(caches: dict[str, Path]) -> None:
    cache = caches["tiny-shared"]
    row: Any = next(r for r in rows_in(cache, Unit(0, 0)) if r.masked.size >= 3)
    ids, logp = row.topk_ids.reshape(-1, 8), row.topk_logp.reshape(-1, 8)
    sizes = np.full(row.masked.size, 8, np.int32)
    sizes[1] = 2
    keep = np.arange(8) < sizes[:, None]
    kept = {"topk_sizes": sizes, "topk_ids": ids[keep], "topk_logp": logp[keep]}
    batch = collate([dataclasses.replace(row, **kept)], load_manifest(cache))
    assert batch["topk_kept"].sum(1).tolist() == sizes.tolist()
    assert (batch["topk_ids"][1, 2:] == int(ids[1, 0])).all()
    assert batch["topk_ids"][2].tolist() == ids[2].tolist()


@st.composite
def batches(draw: Any) -> tuple[list[int], list[list[np.ndarray]], int]:
    """Lengths of examples, the masked positions of each one's draws, a block."""
    lengths = draw(st.lists(st.integers(1, 24), min_size=1, max_size=3))
    masked = []
    for n in lengths:
        sets = draw(st.lists(st.sets(st.integers(0, n - 1)), min_size=1, max_size=4))
        masked.append([np.array(sorted(positions), np.int64) for positions in sets])
    return lengths, masked, draw(st.integers(1, 9))


@settings(max_examples=25)
@given(batches(), st.integers(0, 2**31), st.sampled_from([None, 0, 200]))
def test_states_and_gradients_are_those_of_each_draw_alone(
    batch: Any, seed: int, wide: int | None
) -> None:
    """In rows of their own, and in rows that they share."""
    lengths, masked, block = batch
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(0, 49, (len(lengths), max(lengths)), generator=generator)
    model = in_float64(small())

    def run(clean: torch.Tensor, masked: Any, lengths: list[int], whole: bool) -> torch.Tensor:
        width, copies = clean.shape[1], max(map(len, masked))
        row, column = [], []
        for i, draws in enumerate(masked):
            for j, positions in enumerate(draws):
                row += [i] * positions.size
                column += (positions + j * width).tolist()
        row, column = torch.tensor(row).long(), torch.tensor(column).long()
        noised = clean.repeat(1, copies)
        noised[row, column] = 49
        places, place = places_of_draws(masked, lengths, block, wide)
        if whole:
            places, place = all_places(lengths), row * 2 * width + column
        return masked_hidden(model, noised, clean, places, place, block)

    def gradients(hidden: torch.Tensor) -> Any:
        loss = hidden.flatten() @ torch.linspace(-1, 1, hidden.numel()).double()
        given = list(model.model.parameters())
        return torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)

    together = run(clean, masked, lengths, False)
    alone = []
    for i, n in enumerate(lengths):
        alone += [run(clean[i : i + 1, :n], [[one]], [n], True) for one in masked[i]]
    alone = torch.cat(alone)
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(together), gradients(alone), rtol=1e-9, atol=1e-9)


@given(st.lists(st.integers(0, 90), min_size=1, max_size=9), st.integers(0, 300))
def test_rows_are_shared_where_that_saves_padding(sizes: list[int], width: int) -> None:
    rows, longest = pack(sizes, max(width, *sizes, 1)), max(1, *sizes)
    ends = np.bincount(rows, sizes)
    assert len(ends) == len(set(rows)) and ends.max() <= max(width, longest)
    assert len(ends) * max(1, ends.max()) <= len(sizes) * longest
    if width >= sum(sizes) > 0:  # no row is longer than that, so nothing is padded
        assert len(ends) * ends.max() == sum(sizes)


def test_the_prompt_the_last_block_and_an_example_without_masks_are_left_out() -> None:
    places, _ = places_of_draws([[np.array([33, 70])]], [96], 32)
    assert places.tolist() == [[*range(32, 96), *range(96, 96 + 64)]]
    places, column = places_of_draws([[np.zeros(0, np.int64)]], [40], 8)
    assert places.tolist() == [[-1]] and column.numel() == 0


def test_a_step_says_how_much_of_it_is_padding() -> None:
    masked = [[np.arange(n)] for n in (8, 4, 3)]
    batches = []
    for width in (None, 0, 99):
        places, _ = places_of_draws(masked, [8, 4, 3], 4, width)
        batches.append({"clean": torch.zeros(3, 8), "noised": torch.zeros(3, 8), "places": places})
    real = 8 + 4 + 4 + 3  # with a block of x_0
    expected = [1 - real / 36, 1 - real / 24, 0.0]
    for batch, share in zip(batches, expected, strict=True):
        assert padding_of([batch]) == pytest.approx((share, 1 - real / 36))
