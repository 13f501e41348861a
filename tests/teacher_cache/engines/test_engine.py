from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model
from teacher_cache.engines.packs import fill, observed_first
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.method.comp_demo import Request
from teacher_cache.method.targets import TargetSpec
from teacher_cache.teachers.registry import Attention, BlockCausal, Full, Native, X0Xt
from tests.teacher_cache.engines.plain_inputs import build_inputs

SPEC = TargetSpec(8, 1.0, (1.0, 2.0))


def requests(count: int, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(rng.integers(4, 60))
        ids = rng.integers(0, 4090, length).astype(np.int32)
        read = np.flatnonzero(rng.random(length) < 0.4).astype(np.int32)
        read = read[read > 0] if (read > 0).any() else np.array([1], np.int32)
        gold = ids[read].copy()
        ids[read] = 4095
        made.append(Request(ids, read, gold))
    return made


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 300))
def test_batches_hold_everything_once_within_the_budget(lengths: list[int], budget: int) -> None:
    for padded in (False, True):
        batches = fill(lengths, budget, padded)
        assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
        for batch in batches:
            own = [lengths[i] for i in batch]
            assert len(batch) == 1 or (max(own) * len(own) if padded else sum(own)) <= budget


@pytest.mark.parametrize(
    "attention", [Full(), BlockCausal(8), X0Xt(8), Native(8)], ids=lambda a: a.type
)
@pytest.mark.parametrize("shift", [False, True])
def test_alone_and_in_a_batch_are_equal(
    random_teacher: Path, attention: Attention, shift: bool
) -> None:
    model = load_model(open_checkpoint(str(random_teacher)), "llama", torch.float32)
    asked = requests(9)
    together = TransformersEngine(model, attention, SPEC, shift=shift).score(asked)
    single = TransformersEngine(
        model, attention, SPEC, shift=shift, tokens_per_batch=1, head_rows=3
    )
    for request, expected in zip(asked, together, strict=True):
        (alone,) = single.score([request])
        for name in ("gold_logp", "logsumexp", "topk_logp", "tail_odds"):
            np.testing.assert_allclose(
                getattr(alone, name), getattr(expected, name), rtol=1e-6, atol=1e-6
            )


def test_scores_are_those_of_the_plain_model(random_teacher: Path) -> None:
    """Against a full forward pass with full-vocabulary logits, one sequence at a time."""
    checkpoint = open_checkpoint(str(random_teacher))
    model, own = (load_model(checkpoint, "llama", torch.float32) for _ in range(2))
    asked = requests(4, seed=1)
    for shift in (0, 1):
        for request, scores in zip(
            asked,
            TransformersEngine(own, Full(), SPEC, shift=bool(shift)).score(asked),
            strict=True,
        ):
            ids = torch.from_numpy(request.ids).long()[None]
            with torch.no_grad():
                mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
                logits = model(input_ids=ids, attention_mask=mask).logits[0].double()
            rows = logits[torch.from_numpy(request.read).long() - shift]
            np.testing.assert_allclose(scores.logsumexp, torch.logsumexp(rows, 1), rtol=1e-5)
            assert scores.topk_logp is not None
            logp = torch.log_softmax(rows, 1)
            np.testing.assert_allclose(scores.topk_logp, logp.topk(8).values, rtol=1e-4, atol=1e-5)
            gold = logp.gather(1, torch.from_numpy(request.gold).long()[:, None])[:, 0]
            np.testing.assert_allclose(scores.gold_logp, gold, rtol=1e-4, atol=1e-5)


def test_sums_of_what_is_outside_are_those_of_full_logits(random_teacher: Path) -> None:
    model = load_model(open_checkpoint(str(random_teacher)), "llama", torch.float32)
    asked, shared = requests(5, seed=4), np.arange(4096) % 7 != 0
    engine = TransformersEngine(
        model, Full(), SPEC, head_rows=9, tokens_per_batch=64, shared_ids=shared
    )
    found = engine.outside(asked)
    logits = torch.cat([logits for logits, _ in engine.logits(asked)]).double()
    logits[:, ~torch.from_numpy(shared)] = -torch.inf
    for i, t in enumerate(SPEC.temperatures):
        p = torch.softmax(logits / t, 1)
        expected = p.scatter(1, logits.topk(8, 1).indices, 0.0).sum(0)
        np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-7)
    classes = (np.arange(4096) % 3).astype(np.int32)
    classes[~shared] = -1
    engine.use_classes(classes)
    scores = engine.score(asked)
    for c in range(3):
        mass = sum(
            np.exp(s.class_mass[:, 1, c].astype(np.float64)).sum()
            for s in scores
            if s.class_mass is not None
        )
        assert mass == pytest.approx(found[1][classes == c].sum(), rel=1e-4)


def test_the_head_runs_at_the_rows_that_are_read_and_no_other(random_teacher: Path) -> None:
    model = load_model(open_checkpoint(str(random_teacher)), "llama", torch.float32)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0].shape[0]))
    asked = requests(7, seed=2)
    TransformersEngine(model, Full(), SPEC, head_rows=10).score(asked)
    assert sum(rows) == sum(len(r.read) for r in asked)
    assert max(rows) <= 10


def test_no_requests_no_scores(random_teacher: Path) -> None:
    model = load_model(open_checkpoint(str(random_teacher)), "llama", torch.float32)
    assert TransformersEngine(model, Full(), SPEC).score([]) == []


@pytest.mark.parametrize(
    "attention", [Full(), BlockCausal(8), X0Xt(8), Native(8)], ids=lambda a: a.type
)
def test_no_row_of_a_batch_is_empty_and_reads_stand_at_their_masks(attention: Attention) -> None:
    asked = requests(6, seed=3)
    inputs = build_inputs(attention, asked)
    assert inputs.mask.any(-1).all()
    row = torch.from_numpy(np.repeat(np.arange(6), [len(r.read) for r in asked]))
    assert (inputs.ids[row, inputs.columns] == 4095).all()
    assert (
        inputs.positions[row, inputs.columns].tolist()
        == np.concatenate([r.read for r in asked]).tolist()
    )


@given(st.integers(0, 500), st.integers(1, 9))
def test_observed_first_moves_masks_to_the_end_of_their_block_only(seed: int, block: int) -> None:
    (request,) = requests(1, seed)
    order = observed_first(request, block)
    assert sorted(order.tolist()) == list(range(len(request.ids)))
    masked = np.isin(order, request.read)
    for start in range(0, len(order), block):
        part, flags = order[start : start + block], masked[start : start + block]
        assert set(part.tolist()) == set(range(start, min(start + block, len(order))))
        assert not (flags[:-1] & ~flags[1:]).any()
        assert (np.diff(part[flags]) > 0).all()
        assert (np.diff(part[~flags]) > 0).all()


def test_block_diffusion_teachers_never_see_the_answer(random_teacher: Path) -> None:
    """Changing a gold token changes nothing that is read in its own or an earlier block."""
    model = load_model(open_checkpoint(str(random_teacher)), "llama", torch.float32)
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
