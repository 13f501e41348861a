"""Gradients before a training, against their definition in float64 and what geometry says."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.plan.gradients import Gradients, compare, measure_gradients, table
from shared.cache.manifest import load_manifest
from shared.cache.row import without_masks
from shared.system.files import TideError
from student_train.batches.collate import TargetReader, collate
from student_train.losses.objective import objective
from student_train.training.heldout import HeldOut
from student_train.training.trainer import make_trainer
from tests.reading import layout_of
from tests.student_train.places import in_float64
from tests.student_train.training.test_trainer import config

TEMPERATURES, WEIGHTS = [0.5, 2.0], [1.0, 20.0]


def by_definition(run: Any, temperatures: list[float]) -> list[Tensor]:
    """In float64 and at one go: the gradients of the held-out NLL, of cross-entropy, and of the
    distillation at each temperature, [parameters].
    """
    trainer, _ = make_trainer(run)
    data: Any = trainer.train_dataset
    rows = [row for i in range(data.batches_in(0)) for row in data.rows(i)]
    layout, kind = layout_of(run.cache), run.distillation
    model: Any = in_float64(trainer.model)
    tables: Any = layout.tables
    words = tables.token_map if kind.needs == "topk" else None
    batch = collate(rows, load_manifest(run.cache), words)
    targets = TargetReader(layout, model.config.vocab_size)(batch)

    def gradient(value: Tensor) -> Tensor:
        parts = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    def log_likelihood(logits: Tensor, gold: Tensor) -> Tensor:
        return torch.log_softmax(logits, dim=1).gather(1, gold[:, None]).squeeze(1)

    assert trainer.heldout is not None
    nll = torch.zeros((), dtype=torch.float64)
    for part in trainer.heldout.batches:
        gold = part["clean"][part["row"], part["column"]]
        nll = nll - log_likelihood(model(batch=part), gold).sum() / trainer.heldout.masked
    logits = model(batch=batch)
    maskable, read, chunks = batch["counts"]
    ce = -(log_likelihood(logits, batch["gold"]) / batch["t"]).sum() / maskable
    values = [nll, ce]
    for temperature in temperatures:
        settings = replace(kind, temperature=temperature)
        total = objective(logits, targets, settings, 0.5).distillation
        values.append(total / (chunks if kind.needs == "chunks" else read))
    return [gradient(value) for value in values]


@pytest.mark.parametrize(
    ("teacher", "kind"),
    [
        ("tiny-shared", {"type": "kl", "tidal": {}}),
        ("tiny-shared", {"type": "reverse_kl"}),
        ("tiny-shared", {"type": "calm"}),
        ("tiny-cross", {"type": "kl"}),  # through the counted map
        ("tiny-cross", {"type": "reverse_calm"}),
    ],
)
def test_sizes_and_cosines_are_those_of_the_definition(
    caches: dict[str, Path], tmp_path: Path, teacher: str, kind: dict[str, Any]
) -> None:
    run = config(caches[teacher], tmp_path, distillation=kind, batch_size=1)
    found = measure_gradients(run, TEMPERATURES, WEIGHTS, 24)
    heldout, ce, *others = by_definition(run, TEMPERATURES)

    def cosine(gradient: Tensor) -> float:
        return float(gradient @ heldout / gradient.norm() / heldout.norm())

    first, *lines = found.lines
    assert len(found.masked) == 24 and (first.temperature, first.size) == (None, 1.0)
    assert first.alone.sum() == pytest.approx(cosine(ce), abs=1e-5)
    for line, temperature, gradient in zip(lines, TEMPERATURES, others, strict=True):
        assert line.temperature == temperature
        assert line.size == pytest.approx(float(gradient.norm() / ce.norm()), rel=1e-4)
        assert line.alone.sum() == pytest.approx(cosine(gradient), abs=1e-5)
        for weight in WEIGHTS:
            expected = cosine(ce + weight * gradient)
            assert line.sums[weight].sum() == pytest.approx(expected, abs=1e-5)
    assert len(table(found, "kl")) == 2 + 3 + 2


def test_rows_that_are_held_out_themselves_are_led_to_by_cross_entropy(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    """Where t is 1 both gradients are the same, and whatever is added turns away from it, the more
    the more of it. A row with nothing masked has no part.
    """
    run = config(caches["tiny-shared"], tmp_path, distillation={"type": "kl"}, batch_size=4)
    trainer, _ = make_trainer(run)
    data: Any = trainer.train_dataset
    batches = [{**data[i], "t": torch.ones_like(data[i]["t"])} for i in range(3)]
    empty = collate([without_masks(row) for row in data.rows(0)], load_manifest(run.cache))
    trainer.heldout = HeldOut(batches, (), sum(batch["gold"].numel() for batch in batches))
    weights = [0.1, 1.0, 10.0, 1e6]
    found, more = (compare(trainer, b, [1.0], weights) for b in (batches, [*batches, empty]))
    first, second = found.lines
    assert first.alone.sum() == pytest.approx(1, abs=1e-6)
    falling = [first.alone.sum(), *(second.sums[w].sum() for w in weights)]
    assert falling == sorted(falling, reverse=True) and falling[0] > falling[1]
    assert falling[-1] == pytest.approx(second.alone.sum(), abs=1e-4)
    for one, other in zip(found.lines, more.lines, strict=True):
        np.testing.assert_allclose(other.alone, [*one.alone, 0.0], atol=1e-6)
        assert other.size == pytest.approx(one.size, rel=1e-6)
    with pytest.raises(TideError):
        compare(trainer, [empty, empty], [1.0], weights)


def test_the_error_is_that_of_a_sum_and_not_of_the_batches_lengths() -> None:
    values = np.array([0.1, 0.3, 0.2, 0.6])
    equal, uneven = (Gradients([], np.array(sizes)) for sizes in ([5, 5, 5, 5], [1, 3, 2, 6]))
    assert equal.error(values) == pytest.approx(math.sqrt(4) * values.std(ddof=1))
    assert uneven.error(values) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("changes", "rows"),
    [({"distillation": {"type": "none"}}, 8), ({"heldout": None}, 8), ({}, 1)],
    ids=["no distillation", "no held-out set", "one batch"],
)
def test_what_gives_no_gradient_to_compare_is_refused(
    caches: dict[str, Path], tmp_path: Path, changes: dict[str, Any], rows: int
) -> None:
    run = config(caches["tiny-shared"], tmp_path, **{"distillation": {"type": "kl"}, **changes})
    with pytest.raises(TideError):
        measure_gradients(run, [1.0], [1.0], rows)
