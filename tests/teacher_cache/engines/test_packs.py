"""What the engine runs equals the definition of each attention mode, with fewer rows."""

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from teacher_cache.engines.packs import fill, observed_first, pack_requests
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.method.comp_demo import Request
from teacher_cache.method.targets import TargetSpec
from teacher_cache.teachers.registry import BlockCausal, Full, Native, X0Xt
from tests.student_train.places import in_float64
from tests.teacher_cache.engines.plain_inputs import build_inputs

KINDS: dict[str, Any] = {
    "full": lambda _: Full(),
    "block_causal": BlockCausal,
    "x0_xt": X0Xt,
    "native": Native,
}
MASK = 96


@lru_cache
def teacher(user: str) -> Any:
    """A small Llama in float64; one for each user, since an engine changes how its model attends."""  # noqa: E501
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        num_hidden_layers=2,
        initializer_range=0.3,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config._attn_implementation = "sdpa"
    return in_float64(LlamaForCausalLM(config)).eval()


def passes_of(rng: Any, ids: np.ndarray, masked: np.ndarray, mask: int) -> list[Request]:
    """The two CompDemo passes of a draw."""
    part, requests = rng.random(masked.size) < 0.5, []
    for read in (masked[part], masked[~part]):
        if read.size:
            noised = ids.copy()
            noised[read] = mask
            requests.append(Request(noised, read.astype(np.int32), ids[read]))
    return requests


@st.composite
def examples(draw: Any, shift: int) -> list[Request]:
    """Passes of several examples, of up to four draws each, in an order of their own."""
    requests = []
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(2, 30))
        rng = np.random.default_rng(draw(st.integers(0, 2**20)))
        ids = rng.integers(0, MASK, length).astype(np.int32)
        prompt = draw(st.integers(shift, length - 1))
        for _ in range(draw(st.integers(1, 4))):
            chosen = (rng.random(length) < rng.random()) & (np.arange(length) >= prompt)
            requests += passes_of(rng, ids, np.flatnonzero(chosen), MASK)
    return draw(st.permutations(requests))


@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(max_examples=25)
@given(data=st.data())
def test_logits_are_those_of_whole_sequences_under_the_explicit_mask(kind: str, data: Any) -> None:
    shift = data.draw(st.integers(0, 1)) if kind in ("full", "block_causal") else 0
    attention, asked = KINDS[kind](data.draw(st.integers(1, 9))), data.draw(examples(shift))
    budget = data.draw(st.sampled_from([1, 40, 10_000]))
    engine = TransformersEngine(
        teacher(kind),
        attention,
        TargetSpec(8, 1.0, (1.0,)),
        shift=bool(shift),
        tokens_per_batch=budget,
        head_rows=7,
    )
    plain, done = teacher("plain"), []
    with torch.inference_mode():
        for packs in engine.batches(asked):
            batch = engine.batch(packs)
            members = [i for pack in packs for i in pack.members]
            logits = plain.lm_head(engine.hidden(batch))
            for i, own in zip(
                members, logits.split([len(asked[i].read) for i in members]), strict=True
            ):
                inputs = build_inputs(attention, [asked[i]])
                hidden = plain.model(
                    input_ids=inputs.ids,
                    attention_mask=inputs.mask,
                    position_ids=inputs.positions,
                    use_cache=False,
                ).last_hidden_state
                expected = plain.lm_head(hidden[0, inputs.columns - shift])
                torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9)
            done += members
    assert sorted(done) == list(range(len(asked)))


def conversations(count: int, draws: int) -> list[Request]:
    """Of 768 tokens, a third of them prompt, t stratified."""
    rng, requests = np.random.default_rng(0), []
    for _ in range(count):
        ids, offset = rng.integers(0, 1000, 768).astype(np.int32), rng.random()
        for draw in range(draws):
            t = (offset + draw / draws) % 1
            masked = np.flatnonzero((rng.random(768) < t) & (np.arange(768) >= 256))
            requests += passes_of(rng, ids, masked, 1001)
    return requests


def test_rows_of_four_draws() -> None:
    asked = conversations(20, 4)
    whole = sum(len(request.ids) for request in asked)
    for attention, most in ((Native(32), 0.8), (X0Xt(32), 0.8), (BlockCausal(32), 0.75)):
        packs = pack_requests(attention, asked, budget=16_384)
        assert sum(pack.width for pack in packs) <= most * whole


def test_nothing_is_padded_and_no_mask_is_made_under_full_attention() -> None:
    asked, rows = conversations(3, 2), 0
    spec = TargetSpec(8, 1.0, (1.0,))
    engine = TransformersEngine(teacher("full"), Full(), spec, tokens_per_batch=1600)
    for packs in engine.batches(asked):
        arguments = engine.batch(packs)[0]
        rows += arguments["input_ids"].numel()
        assert arguments["attention_mask"].numel() == 0
    assert rows == sum(len(request.ids) for request in asked)


def test_the_row_before_the_first_is_never_asked() -> None:
    ids, read, gold = (np.array(values, np.int32) for values in ([MASK, 3], [0], [5]))
    with pytest.raises(ValueError):  # noqa: PT011
        pack_requests(Full(), [Request(ids, read, gold)], shift=1)


@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 300))
def test_batches_hold_everything_once_within_the_budget(lengths: list[int], budget: int) -> None:
    for padded in (False, True):
        batches = fill(lengths, budget, padded)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        for batch in batches:
            own = [lengths[i] for i in batch]
            assert len(batch) == 1 or (max(own) * len(own) if padded else sum(own)) <= budget


@given(st.integers(0, 500), st.integers(1, 9))
def test_observed_first_moves_masks_to_the_end_of_their_block_only(seed: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, 60))
    ids, read = np.zeros(length, np.int32), np.flatnonzero(rng.random(length) < 0.4)
    order = observed_first(Request(ids, read.astype(np.int32), ids[read]), block)
    for start in range(0, length, block):
        part = order[start : start + block]
        flags = np.isin(part, read)
        assert sorted(part.tolist()) == list(range(start, min(start + block, length)))
        assert not (flags[:-1] & ~flags[1:]).any()
        assert (np.diff(part[flags]) > 0).all() and (np.diff(part[~flags]) > 0).all()
