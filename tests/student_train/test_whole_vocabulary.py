"""From chats through Parquet to the gradient: at k = V it is that of the teacher's full logits."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shared.cache.manifest import load_manifest
from shared.cache.shards import Unit
from shared.settings.config import KL, ReverseKL, Tidal
from student_train.batches.collate import TargetReader, collate
from student_train.losses.divergence import strength_at, training_strength
from student_train.losses.objective import objective
from teacher_cache.run.build import build_cache
from teacher_cache.run.open import open_or_begin
from teacher_cache.run.work import load_engine, prepare_unit
from tests.conftest import small_cache_config
from tests.reading import layout_of, rows_in


@pytest.fixture(scope="module")
def exact(
    random_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.Tensor]:
    """A cache of all 4,096 logits, and the teacher's own at its masked positions, in its order."""
    out = tmp_path_factory.mktemp("exact") / "c"
    targets = {"k": 4096, "classes": 1, "pilot": 20, "values": "float32", "signals": ["topk"]}
    source = small_cache_config("tiny-shared", random_teacher, out).sources[0].source
    changes = {"targets": targets, "noise": {"draws": 1}, "data": {"source": source, "limit": 3}}
    config = small_cache_config("tiny-shared", random_teacher, out, **changes)
    build_cache(config)
    plan = open_or_begin(config)
    work = prepare_unit(plan, Unit(0, 0), plan.data.between(0, 3))
    engine: Any = load_engine(plan)
    logits, found = iter(engine.logits(work.requests)), []
    for item in work.items:
        whole = torch.zeros(item.view.positions.size, 4096)
        for rows in item.rows:
            whole[torch.from_numpy(rows)] = next(logits)[0]
        found.append(whole)
    return out, torch.cat(found)


@pytest.mark.parametrize("settings", [KL(2.0, Tidal()), ReverseKL(2.0)], ids=["kl", "reverse"])
def test_the_gradient_is_that_of_full_logits(
    exact: tuple[Path, torch.Tensor], settings: KL | ReverseKL
) -> None:
    cache, teacher = exact
    manifest = load_manifest(cache)
    batch = collate(rows_in(cache, Unit(0, 0)), manifest)
    targets = TargetReader(manifest, layout_of(cache))(batch)
    torch.manual_seed(0)
    x = torch.randn(len(teacher), 4096, requires_grad=True)
    value = objective(x, targets, settings, 0.5).distillation
    (slope,) = torch.autograd.grad(value, x)
    y, t = x.detach().double().requires_grad_(), settings.temperature
    q, p = torch.log_softmax(y / t, 1), torch.log_softmax(teacher.double() / t, 1)
    if settings.tidal is not None:
        train = training_strength(settings.tidal, 0.5)
        part = strength_at(settings.tidal, train, targets.t).double()[:, None]
        p = torch.log_softmax((1 - part) * q.detach() + part * p, 1)
    a, b = (p, q) if isinstance(settings, KL) else (q, p)
    expected = t**2 * (a.exp() * (a - b)).sum()
    (gradient,) = torch.autograd.grad(expected, y)
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float((slope - gradient).norm() / gradient.norm()) < 1e-5
