import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.method import Request, TargetSpec
from teacher_cache.teachers.registry import Attention, BlockCausal, Full, Native, X0Xt

SPEC = TargetSpec(8, 1.0, (1.0, 2.0))


def requests(count: int, seed: int = 0) -> list[Request]:
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        length = int(rng.integers(4, 60))
        ids = rng.integers(0, 4090, length).astype(np.int32)
        read = np.flatnonzero(rng.random(length) < 0.4).astype(np.int32)
        read = read[read > 0] if (read > 0).any() else np.array([1], np.int32)
        gold = ids[read].copy()
        ids[read] = 4095
        made.append(Request(ids, read, gold))
    return made


@pytest.fixture
def model(random_teacher: Path) -> Any:
    return load_model(open_checkpoint(str(random_teacher)), "llama", torch.float32)


@pytest.mark.parametrize("attention", [Full(), BlockCausal(8), X0Xt(8), Native(8)])
def test_alone_and_in_a_batch_are_equal(model: Any, attention: Attention) -> None:
    asked, one = requests(9), {"tokens_per_batch": 1, "head_rows": 3}
    for shift in (False, True):
        engine = TransformersEngine(model, attention, SPEC, shift=shift)
        single = TransformersEngine(model, attention, SPEC, shift=shift, **one)
        for request, expected in zip(asked, engine.score(asked), strict=True):
            (alone,) = single.score([request])
            for name in ("gold_logp", "logsumexp", "topk_logp", "tail_odds"):
                a, b = getattr(alone, name), getattr(expected, name)
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert engine.score([]) == []


def test_scores_are_those_of_the_plain_model(model: Any, random_teacher: Path) -> None:
    """Against full-vocabulary logits, one sequence at a time; the head runs at no other row."""
    own = load_model(open_checkpoint(str(random_teacher)), "llama", torch.float32)
    rows: list[int] = []
    own.lm_head.register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0].shape[0]))
    asked = requests(4, seed=1)
    for shift in (0, 1):
        rows.clear()
        engine = TransformersEngine(own, Full(), SPEC, shift=bool(shift), head_rows=10)
        scored = engine.score(asked)
        assert sum(rows) == sum(len(r.read) for r in asked) and max(rows) <= 10
        for request, scores in zip(asked, scored, strict=True):
            ids = torch.from_numpy(request.ids).long()[None]
            with torch.no_grad():
                mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
                logits = model(input_ids=ids, attention_mask=mask).logits[0].double()
            read = logits[torch.from_numpy(request.read).long() - shift]
            np.testing.assert_allclose(scores.logsumexp, torch.logsumexp(read, 1), rtol=1e-5)
            assert scores.topk_logp is not None
            logp = torch.log_softmax(read, 1)
            np.testing.assert_allclose(scores.topk_logp, logp.topk(8).values, rtol=1e-4, atol=1e-5)
            gold = logp.gather(1, torch.from_numpy(request.gold).long()[:, None])[:, 0]
            np.testing.assert_allclose(scores.gold_logp, gold, rtol=1e-4, atol=1e-5)


def test_sums_of_what_is_outside_are_those_of_full_logits(model: Any) -> None:
    asked, shared = requests(5, seed=4), np.arange(4096) % 7 != 0
    sizes = {"head_rows": 9, "tokens_per_batch": 64}
    engine = TransformersEngine(model, Full(), SPEC, shared_ids=shared, **sizes)
    sums = engine.outside(asked)
    logits = torch.cat([logits for logits, _ in engine.logits(asked)]).double()
    logits[:, ~torch.from_numpy(shared)] = -torch.inf
    for i, t in enumerate(SPEC.temperatures):
        p = torch.softmax(logits / t, 1)
        expected = p.scatter(1, logits.topk(8, 1).indices, 0.0).sum(0)
        np.testing.assert_allclose(sums[i], expected, rtol=1e-4, atol=1e-7)
    classes = (np.arange(4096) % 3).astype(np.int32)
    classes[~shared] = -1
    engine.use_classes(classes)
    masses = [np.exp(scores.class_mass.astype(np.float64)) for scores in engine.score(asked)]  # type: ignore[union-attr]
    for c in range(3):
        mass = sum(one[:, 1, c].sum() for one in masses)
        assert mass == pytest.approx(sums[1][classes == c].sum(), rel=1e-4)


def test_block_diffusion_teachers_never_see_the_answer(model: Any) -> None:
    """Changing a gold token changes nothing that is read in its own or an earlier block."""
    (request,) = requests(1, seed=5)
    for attention in (X0Xt(8), Native(8)):
        engine = TransformersEngine(model, attention, SPEC)
        (base,) = engine.score([request])
        for i, position in enumerate(request.read):
            gold = request.gold.copy()
            gold[i] = (gold[i] + 1) % 4090
            (moved,) = engine.score([Request(request.ids, request.read, gold)])
            upto = request.read // 8 <= position // 8
            np.testing.assert_array_equal(moved.logsumexp[upto], base.logsumexp[upto])


# Without the tests' import hook, which torch.compile would have to trace through.
COMPILED = """
import sys
import numpy as np, torch
from torch._dynamo.utils import counters
from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.method import TargetSpec
from teacher_cache.teachers.registry import Full, Native
from tests.teacher_cache.engines.test_engine import requests

worst, graphs, spec = 0.0, [], TargetSpec(8, 1.0, (1.0,))
for attention in (Full(), Native(8)):
    values = []
    for compiled in (False, True):
        counters.clear()
        model = load_model(open_checkpoint(sys.argv[1]), "llama", torch.float32)
        engine = TransformersEngine(model, attention, spec, tokens_per_batch=90, compiled=compiled)
        scores = []
        for seed in range(4):
            scores += engine.score(requests(9, seed))
            graphs += [counters["stats"]["unique_graphs"]] if compiled and seed in (0, 3) else []
        values.append(np.concatenate([s.topk_logp.reshape(-1) for s in scores]))
    worst = max(worst, float(np.abs(values[0] - values[1]).max()))
print(worst, *graphs)
"""


@pytest.mark.slow
def test_compiled_layers_give_the_same_and_compile_once(random_teacher: Path) -> None:
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", COMPILED, str(random_teacher)]
    path = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    worst, *graphs = done.stdout.split()
    assert float(worst) < 1e-4
    # Four lots of requests of other lengths compile nothing anew.
    assert graphs[0] == graphs[1] and graphs[2] == graphs[3]
