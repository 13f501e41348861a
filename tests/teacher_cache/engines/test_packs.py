import os
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_mask

from shared.diffusion import block_causal
from shared.models.checkpoint import open_checkpoint
from shared.models.flex import FLEX
from shared.models.loading import load_model, meta_model
from teacher_cache.engines import transformers_engine
from teacher_cache.engines.packs import clean_ids, fill, observed_first, pack_requests, side_by_side
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.method import Request, TailEncoder, TargetSpec, extract
from teacher_cache.teachers.registry import BlockCausal, Full, Native, X0Xt
from tests.plain_masks import block_diffusion_batch, within_block_causal
from tests.reading import random_tables
from tests.student_train.places import in_float64

MASK, SPEC = 4095, TargetSpec(8, 1.0, (1.0, 2.0))


def requests(count: int, seed: int = 0) -> list[Request]:
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        length = int(rng.integers(4, 60))
        ids = rng.integers(0, 4090, length).astype(np.int32)
        read = np.flatnonzero(rng.random(length) < 0.4).astype(np.int32)
        read = read[read > 0] if (read > 0).any() else np.array([1], np.int32)
        gold = ids[read].copy()
        ids[read] = MASK
        made.append(Request(ids, read, gold))
    return made


@pytest.fixture
def model(random_teacher: Path) -> Any:
    return load_model(open_checkpoint(str(random_teacher)), "llama", torch.float32)


def test_scores_are_those_of_the_plain_model(model: Any, random_teacher: Path) -> None:
    """Against full-vocabulary logits, one sequence at a time; the head runs at no other row."""
    own = load_model(open_checkpoint(str(random_teacher)), "llama", torch.float32)
    asked, rows = requests(4, seed=1), []
    own.lm_head.register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0].shape[0]))
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
            np.testing.assert_allclose(scores["logsumexp"], torch.logsumexp(read, 1), rtol=1e-5)
            assert scores["topk_logp"] is not None
            logp = torch.log_softmax(read, 1)
            np.testing.assert_allclose(
                scores["topk_logp"], logp.topk(8).values, rtol=1e-4, atol=1e-5
            )
            gold = logp.gather(1, torch.from_numpy(request.gold).long()[:, None])[:, 0]
            np.testing.assert_allclose(scores["gold_logp"], gold, rtol=1e-4, atol=1e-5)


def test_tails_are_those_of_one_head_over_all_states(model: Any) -> None:
    asked, shared = requests(5, seed=4), np.arange(4096) % 7 != 0
    sizes: Any = {"head_rows": 9, "tokens_per_batch": 64}
    engine = TransformersEngine(model, Full(), SPEC, shared_ids=shared, **sizes)
    hidden, head = engine.hidden_states(asked), model.lm_head.weight.detach().float()
    tables = replace(random_tables(4096, hidden.shape[1], 3, step=0.0), shared=shared)
    engine.use_tables(tables)
    gold = torch.from_numpy(np.concatenate([request.gold for request in asked])).long()
    encoder = TailEncoder(tables, SPEC.temperatures)
    excluded = torch.from_numpy(np.flatnonzero(~shared))
    whole = extract(hidden @ head.T, hidden, gold, SPEC, excluded, encoder)
    scores = engine.score(asked)
    for name in ("tail_code", "tail_level"):
        found = np.concatenate([one[name] for one in scores])
        np.testing.assert_allclose(found, whole[name], rtol=1e-4, atol=1e-3)


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
            np.testing.assert_array_equal(moved["logsumexp"][upto], base["logsumexp"][upto])


@pytest.mark.slow
def test_compiled_layers_give_the_same_and_compile_once(random_teacher: Path) -> None:
    root = Path(__file__).parents[3]
    # A process without the tests' import hook, which torch.compile would have to trace through.
    command = [sys.executable, "-m", __name__, str(random_teacher)]
    path = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    worst, *graphs = done.stdout.split()
    assert float(worst) < 1e-4
    # Four lots of requests of other lengths compile nothing anew.
    assert graphs[0] == graphs[1] and graphs[2] == graphs[3]


KINDS = {"full": lambda _: Full(), "block_causal": BlockCausal, "x0_xt": X0Xt, "native": Native}


@lru_cache
def teacher(_user: str, folder: Path) -> Any:
    """The teacher in float64, one for each user: an engine changes how its model attends."""
    return in_float64(load_model(open_checkpoint(str(folder)), "llama", torch.float32))


def plain_hidden(model: Any, kind: str, block: int, request: Request) -> tuple[Tensor, Tensor]:
    """The definition of each attention mode: the whole sequence, an explicit mask, where to read.

    Modes on two copies of the sequence rebuild the clean copy x_0 from the request's gold ids.
    """
    length, read = len(request.ids), torch.from_numpy(request.read).long()
    valid, places = torch.ones(1, length, dtype=torch.bool), torch.arange(length)
    ids, clean = torch.from_numpy(request.ids).long(), torch.from_numpy(clean_ids(request)).long()
    match kind:
        case "full":
            mask = valid[:, None, None].expand(1, 1, length, length)
        case "block_causal":
            mask = block_causal(valid, block)
        case "x0_xt":
            mask = block_diffusion_batch(valid, block, "x0_xt")
            ids, places, read = torch.cat([clean, ids]), places.repeat(2), read + length
        case _:
            order = torch.from_numpy(observed_first(request, block)).long()
            mask = within_block_causal(valid, block)
            ids, places = torch.cat([clean, ids[order]]), torch.cat([places, order])
            read = order.argsort()[read] + length
    hidden = model.model(
        input_ids=ids[None], attention_mask=mask, position_ids=places[None], use_cache=False
    ).last_hidden_state
    return hidden[0], read


def passes_of(rng: Any, ids: np.ndarray, masked: np.ndarray) -> list[Request]:
    """The two CompDemo passes of a draw."""
    part, requests = rng.random(masked.size) < 0.5, []
    for read in (masked[part], masked[~part]):
        if read.size:
            noised = ids.copy()
            noised[read] = MASK
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
            requests += passes_of(rng, ids, np.flatnonzero(chosen))
    return draw(st.permutations(requests))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(max_examples=25)
@given(data=st.data())
def test_logits_are_those_under_the_explicit_mask(
    random_teacher: Path, kind: str, data: Any
) -> None:
    """By dense masks, and by flex_attention, as on CUDA."""
    shift = data.draw(st.integers(0, 1)) if kind in ("full", "block_causal") else 0
    block = data.draw(st.integers(1, 9))
    asked, budget = data.draw(examples(shift)), data.draw(st.sampled_from([1, 40, 10_000]))
    sizes: Any = {"tokens_per_batch": budget, "head_rows": 7}
    own, plain, done = teacher(kind, random_teacher), teacher("plain", random_teacher), []
    engine = TransformersEngine(own, KINDS[kind](block), SPEC, shift=shift > 0, **sizes)
    if kind != "full":
        own.set_attn_implementation(data.draw(st.sampled_from(["sdpa", FLEX])))
    with torch.inference_mode():
        for packs in engine.batches(asked):
            members = [i for pack in packs for i in pack.members]
            logits = plain.lm_head(engine.hidden(engine.batch(packs)))
            parts = logits.split([len(asked[i].read) for i in members])
            for i, ours in zip(members, parts, strict=True):
                hidden, read = plain_hidden(plain, kind, block, asked[i])
                expected = plain.lm_head(hidden[read - shift])
                torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
            done += members
    assert sorted(done) == list(range(len(asked)))


@settings(max_examples=25)
@given(st.data())
def test_block_masks_are_the_dense_ones_and_padding_sees_itself(data: Any) -> None:
    attention = data.draw(st.sampled_from([BlockCausal, X0Xt, Native]))(
        data.draw(st.integers(1, 9))
    )
    asked = [*data.draw(examples(0)), Request(*np.zeros((3, 0), np.int32))]
    asked += requests(1)
    packs = pack_requests(attention, asked, budget=data.draw(st.sampled_from([1, 999])))
    multiple = data.draw(st.sampled_from([1, 64]))
    dense, made = (
        side_by_side(packs, torch.device("cpu"), multiple, flex)[0]["attention_mask"]
        for flex in (False, True)
    )
    rows = dense.shape[2]
    assert create_mask(made.mask_mod, len(packs), 1, rows, rows, device="cpu").equal(dense)
    for pack, mask in zip(packs, dense[:, 0], strict=True):
        n = len(pack.ids)
        assert mask[n:].equal(torch.eye(rows, dtype=torch.bool)[n:]) and not mask[:n, n:].any()
        assert mask.diagonal().all()


def test_block_masks_are_for_compiled_layers_in_half_precision_on_a_gpu(
    random_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_engine, "compile_layers", lambda _: None)
    raw = open_checkpoint(str(random_teacher)).config
    for device, dtype, compiled, expected in (
        ("cuda", torch.bfloat16, True, FLEX), ("cuda", torch.bfloat16, False, "sdpa"),
        ("cuda", torch.float32, True, "sdpa"), ("cpu", torch.bfloat16, True, "sdpa"),
    ):  # fmt: skip
        made = meta_model("llama", raw).to(dtype)
        monkeypatch.setattr(type(made), "device", torch.device(device))
        TransformersEngine(made, Native(8), SPEC, compiled=compiled)
        assert made.config._attn_implementation == expected


def test_four_draws_run_fewer_rows_and_full_attention_pads_nothing(model: Any) -> None:
    """Of 768 tokens, a third of them prompt, t stratified."""
    rng, asked, rows = np.random.default_rng(0), [], 0
    for _ in range(20):
        ids, offset = rng.integers(0, 1000, 768).astype(np.int32), rng.random()
        for draw in range(4):
            chosen = (rng.random(768) < (offset + draw / 4) % 1) & (np.arange(768) >= 256)
            asked += passes_of(rng, ids, np.flatnonzero(chosen))
    whole = sum(len(request.ids) for request in asked)
    for attention, most in ((Native(32), 0.8), (X0Xt(32), 0.8), (BlockCausal(32), 0.75)):
        packs = pack_requests(attention, asked, budget=16_384)
        assert sum(len(pack.ids) for pack in packs) <= most * whole
    engine = TransformersEngine(model, Full(), SPEC, tokens_per_batch=1600)
    for batch in engine.batches(asked):
        arguments = engine.batch(batch)[0]
        rows += arguments["input_ids"].numel()
        assert arguments["attention_mask"].numel() == 0
    assert rows == whole


def test_passes_shrink_where_memory_runs_out_and_scores_stay(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, tokens = requests(12), []
    engine = TransformersEngine(model, Full(), SPEC, tokens_per_batch=400)
    expected, states, hidden = engine.score(asked), engine.hidden_states(asked), engine.hidden

    def small(batch: Any) -> Tensor:
        tokens.append(batch[0]["input_ids"].numel())
        if tokens[-1] > 120:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")
        return hidden(batch)

    monkeypatch.setattr(engine, "hidden", small)
    with pytest.warns(UserWarning, match="out of memory"):
        assert torch.allclose(engine.hidden_states(asked), states, atol=1e-5)
    tokens.clear()
    for scores, right in zip(engine.score(asked), expected, strict=True):
        np.testing.assert_allclose(scores["gold_logp"], right["gold_logp"], atol=1e-5)
    assert max(tokens) <= 100  # and it does not try larger ones again
    engine._tokens_per_batch = 1
    monkeypatch.setattr(engine, "hidden", lambda _: small(({"input_ids": torch.zeros(999)},)))
    with pytest.raises(torch.OutOfMemoryError):  # nothing is left to be halved
        engine.score(asked)


def test_the_row_before_the_first_is_never_asked() -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        pack_requests(Full(), [Request(*np.array([[MASK], [0], [5]], np.int32))], shift=1)


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


if __name__ == "__main__":
    worst, graphs = 0.0, []
    for attention in (Full(), Native(8)):
        values = []
        for compiled in (False, True):
            counters.clear()
            llama = load_model(open_checkpoint(sys.argv[1]), "llama", torch.float32)
            sizes: Any = {"tokens_per_batch": 90, "compiled": compiled}
            engine = TransformersEngine(llama, attention, SPEC, **sizes)
            scores = []
            for seed in range(4):
                scores += engine.score(requests(9, seed))
                graphs += [counters["stats"]["unique_graphs"]] if compiled and seed % 3 == 0 else []
            values.append(np.concatenate([s["topk_logp"].reshape(-1) for s in scores]))
        worst = max(worst, float(np.abs(values[0] - values[1]).max()))
    print(worst, *graphs)
