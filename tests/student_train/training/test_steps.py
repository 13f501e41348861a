"""What one step sees: `global_batch` and `draws_per_step`, the same rows and the same gradient,
however it is divided over passes and processes.
"""

import json
import shutil
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from shared.cache.ledger import Entry
from shared.cache.manifest import load_manifest
from shared.cache.shards import Shard, Unit
from shared.settings.config import (
    KL,
    Calm,
    Distillation,
    NoDistillation,
    ReverseCalm,
    Tidal,
    TrainConfig,
)
from shared.system.errors import TideError
from student_train.batches.collate import TargetReader, collate, counts_of
from student_train.batches.loader import BatchDataset, OpenCache
from student_train.losses.objective import LossSettings
from student_train.model import train_on_loss
from student_train.training.preflight import settle_batch
from student_train.training.trainer import make_trainer, train_student
from tests.reading import change_column, dataset, layout_of, plain_table, rows_in
from tests.student_train.places import in_float64
from tests.student_train.training.test_trainer import config

OBJECTIVES: dict[str, list[Distillation]] = {
    "tiny-shared": [NoDistillation(), KL(tidal=Tidal()), Calm()],
    "tiny-cross": [ReverseCalm()],
}


@pytest.mark.parametrize(
    ("changes", "processes", "expected"),
    [
        ({"global_batch": 64, "batch_size": 8}, 1, (8, 8)),
        ({"global_batch": 80, "batch_size": 8}, 8, (5, 2)),
        ({"global_batch": 64, "batch_size": 8, "draws_per_step": 4}, 2, (8, 4)),
    ],
)
def test_a_step_is_divided_over_processes_and_passes(
    changes: dict[str, int], processes: int, expected: tuple[int, int]
) -> None:
    settled = settle_batch(TrainConfig(**changes), processes)  # type: ignore
    assert (settled.batch_size, settled.accumulation) == expected
    assert settle_batch(settled, processes) == settled


def test_what_does_not_divide_is_refused(caches: dict[str, Path], tmp_path: Path) -> None:
    for changes, named in (
        ({"global_batch": 64}, "66"),  # a number that three processes share
        ({"global_batch": 60, "accumulation": 7}, "accumulation"),
        ({"batch_size": 4, "draws_per_step": 3}, "draws_per_step"),
    ):
        with pytest.raises(TideError, match=named):
            settle_batch(TrainConfig(**changes), 3)  # type: ignore
    with pytest.raises(TideError, match="draws_per_step"):
        make_trainer(config(caches["tiny-cross"], tmp_path / "r", draws_per_step=4))


def steps(cache: Path, processes: int, **changes: Any) -> list[list[tuple[str, int]]]:
    """The rows of every step of a run, and a check that its counts are theirs."""
    own = settle_batch(TrainConfig(cache=cache, epochs=2.0, **changes), processes)
    data = BatchDataset(OpenCache(own), own, processes)
    parts = processes * (own.accumulation if own.global_batch else 1)
    assert len(data) % parts == 0
    every = []
    for start in range(0, len(data), parts):
        rows = [row for i in range(start, start + parts) for row in data.rows(i)]
        counts = sum(data[i]["counts"] for i in range(start, start + parts))
        assert counts[0] == sum(row.maskable for row in rows)  # type: ignore
        every.append(sorted((row.example_id, row.draw) for row in rows if row.maskable))
    return every


def test_every_division_sees_the_same_rows_in_every_step(caches: dict[str, Path]) -> None:
    cache = caches["tiny-shared"]
    whole = steps(cache, 1, global_batch=12, batch_size=12)
    assert steps(cache, 1, global_batch=12, batch_size=4) == whole
    assert steps(cache, 3, global_batch=12, batch_size=2) == whole
    assert steps(cache, 1, batch_size=10) == steps(cache, 2, batch_size=5)  # the last one is ragged
    several = steps(cache, 1, batch_size=8, draws_per_step=2)
    assert several == steps(cache, 2, batch_size=4, draws_per_step=2)


def test_passes_of_a_step_make_the_gradient_of_one(caches: dict[str, Path], tmp_path: Path) -> None:
    weights = []
    for most in (12, 3):
        out, how = tmp_path / str(most), {"global_batch": 12, "batch_size": most, "max_steps": 3}
        train_student(config(caches["tiny-shared"], out, **how))
        weights.append(load_file(out / "model" / "model.safetensors"))
        recorded = json.loads((out / "run.json").read_text())["config"]
        assert recorded["global_batch"] == 12 and "batch_size" not in recorded
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-6)


@lru_cache
def student(vocabulary: int) -> Any:
    """A small one in float64."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return in_float64(Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, **shape)))


@settings(max_examples=12)
@given(st.data())
def test_loss_and_gradient_of_several_draws_are_those_of_the_rows_one_by_one(
    caches: dict[str, Path], data: Any
) -> None:
    teacher = data.draw(st.sampled_from(sorted(OBJECTIVES)))
    distillation = data.draw(st.sampled_from(OBJECTIVES[teacher]))
    cache, manifest = caches[teacher], load_manifest(caches[teacher])
    examples = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True))
    draws = [rows_in(cache, Unit(draw, 0)) for draw in (0, 1)]
    rows = [draws[draw][i] for i in examples for draw in data.draw(st.permutations((0, 1)))]
    model = student(manifest.fingerprint.student.vocabulary)
    block = manifest.fingerprint.lengths.block
    train_on_loss(model, block, TargetReader(manifest, layout_of(cache)))
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
    torch.testing.assert_close(together[1], alone[1], rtol=1e-9, atol=1e-12)


def test_every_draw_of_every_example_comes_once_and_epochs_count_draws(
    caches: dict[str, Path],
) -> None:
    data = dataset(caches["tiny-cross"], 2, draws_per_step=2, batch_size=4, epochs=2.0, window=2)
    assert data.batches_in(0) * 2 == len(data)  # one pass over two draws: two epochs
    seen: Counter[tuple[str, int]] = Counter()
    for i in range(len(data)):
        rows = data.rows(i)
        seen.update((row.example_id, row.draw) for row in rows)
        assert [row.draw for row in rows] == [0, 1] * (len(rows) // 2)
    assert len(seen) == 48 and set(seen.values()) == {1}


def test_draws_of_other_examples_are_refused(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a cache would be whose ledger says the same."""
    cache = Path(shutil.copytree(caches["tiny-cross"], tmp_path / "c"))
    data = dataset(cache, draws_per_step=2, batch_size=4)
    names = plain_table(Unit(1, 1).path(cache)).column("example_id").combine_chunks()
    change_column(cache, Unit(1, 1), "example_id", names.take(list(range(len(names)))[::-1]))
    monkeypatch.setattr(Entry, "check", lambda *_: None)
    with pytest.raises(TideError, match="part-00001"):
        [data.rows(i) for i in range(len(data))]


def test_a_process_decodes_its_own_rows_only(
    caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    rows = Shard.rows

    def counted(*args: Any) -> list:
        decoded.append(len(args[3]))
        return rows(*args)

    monkeypatch.setattr(Shard, "rows", counted)
    data = dataset(caches["tiny-shared"], 4, batch_size=2)
    for i in range(data.batches_in(0)):
        data.rows(4 * i)
    assert sum(decoded) == 6
