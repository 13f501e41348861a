"""`draws_per_step`: several draws of an example in one pass, and the same loss and gradient as one
after the other.
"""

from __future__ import annotations

import shutil
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from shared.cache.ledger import Entry
from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit
from shared.settings.config import TrainConfig
from shared.settings.objectives import KL, Calm, Distillation, NoDistillation, ReverseCalm, Tidal
from shared.system.errors import TideError
from student_train.batches.collate import TargetReader, collate, counts_of
from student_train.losses.fused_head import LossSettings
from student_train.training.preflight import settle_batch
from student_train.training.step import train_on_loss
from student_train.training.trainer import make_trainer
from tests.reading import change_column, dataset, layout_of, plain_table, rows_in
from tests.student_train.places import in_float64
from tests.student_train.training.test_trainer import config

OBJECTIVES: dict[str, list[Distillation]] = {
    "tiny-shared": [NoDistillation(), KL(tidal=Tidal()), Calm()],
    "tiny-cross": [ReverseCalm()],
}


@lru_cache
def student(vocabulary: int) -> Any:
    """A small one in float64."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return in_float64(
        Qwen3ForCausalLM(
            Qwen3Config(vocab_size=vocabulary, num_hidden_layers=2, head_dim=8, **shape)
        )
    )


@settings(max_examples=12)
@given(st.data())
def test_loss_and_gradient_are_those_of_the_rows_one_by_one(
    caches: dict[str, Path], data: Any
) -> None:
    teacher = data.draw(st.sampled_from(sorted(OBJECTIVES)))
    distillation = data.draw(st.sampled_from(OBJECTIVES[teacher]))
    cache = caches[teacher]
    manifest = load_manifest(cache)
    examples = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True))
    draws = [rows_in(cache, Unit(draw, 0)) for draw in (0, 1)]
    rows = [draws[draw][i] for i in examples for draw in data.draw(st.permutations((0, 1)))]
    model = student(manifest.fingerprint.student.vocabulary)
    read = TargetReader(manifest, layout_of(cache))
    block = manifest.fingerprint.lengths.block
    train_on_loss(model, block, read)
    whole = collate(rows, manifest)
    counts = counts_of(whole["counts"])
    assert len(whole["clean"]) == len(examples)

    def gradient(parts: list[dict[str, Any]]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        total = 0.0
        for part in parts:
            loss, _ = model(batch=part, settings=LossSettings(distillation, 1.0, counts, 0.4))
            loss.backward()
            total += float(loss.detach())
        return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    together = gradient([whole])
    alone = gradient([collate([row], manifest) for row in rows])
    assert together[0] == pytest.approx(alone[0], rel=1e-10)
    for a, b in zip(together[1], alone[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("processes", [1, 2])
def test_every_draw_of_every_example_comes_once_and_epochs_count_draws(
    caches: dict[str, Path], processes: int
) -> None:
    cache = caches["tiny-cross"]
    data = dataset(cache, processes, draws_per_step=2, batch_size=4, epochs=2.0, window=2)
    assert data.batches_in(0) * processes == len(data)  # one pass over two draws: two epochs
    seen = Counter((row.example_id, row.draw) for i in range(len(data)) for row in data.rows(i))
    assert len(seen) == 48 and set(seen.values()) == {1}
    for i in range(len(data)):
        rows = data.rows(i)
        assert [row.draw for row in rows] == [0, 1] * (len(rows) // 2)
        assert len(collate(rows, load_manifest(cache))["clean"]) == len(rows) // 2


def test_however_many_processes_share_a_step_it_sees_the_same_rows(caches: dict[str, Path]) -> None:
    one = dataset(caches["tiny-shared"], 1, draws_per_step=2, batch_size=8)
    two = dataset(caches["tiny-shared"], 2, draws_per_step=2, batch_size=4)
    assert len(two) == 2 * len(one)
    for i in range(len(one)):
        parts = [row for p in range(2) for row in two.rows(2 * i + p)]
        names = [
            sorted((row.example_id, row.draw) for row in rows) for rows in (one.rows(i), parts)
        ]
        assert names[0] == names[1]


def test_what_does_not_fit_is_refused(caches: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TideError, match="draws_per_step"):
        settle_batch(TrainConfig(batch_size=4, draws_per_step=3), 1)
    with pytest.raises(TideError, match="global_batch"):
        settle_batch(TrainConfig(global_batch=6, draws_per_step=4), 1)
    settled = settle_batch(TrainConfig(global_batch=64, batch_size=8, draws_per_step=4), 2)
    assert (settled.batch_size, settled.accumulation) == (8, 4)
    with pytest.raises(TideError, match="draws_per_step"):
        make_trainer(config(caches["tiny-cross"], tmp_path / "r", draws_per_step=4))


def test_draws_of_other_examples_are_refused(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(shutil.copytree(caches["tiny-cross"], tmp_path / "c"))
    data = dataset(cache, draws_per_step=2, batch_size=4)
    names = plain_table(Unit(1, 1).path(cache)).column("example_id").combine_chunks()
    change_column(cache, Unit(1, 1), "example_id", names.take(list(range(len(names)))[::-1]))
    monkeypatch.setattr(
        Entry, "check", lambda *_: None
    )  # as a cache would be whose ledger says the same
    with pytest.raises(TideError, match="examples"):
        [data.rows(i) for i in range(len(data))]
