"""What the engine runs equals the definition of each attention mode, with fewer rows."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from teacher_cache.engines.packs import pack_requests
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.method.comp_demo import Request
from teacher_cache.method.targets import TargetSpec
from teacher_cache.teachers.registry import Attention, BlockCausal, Full, Native, X0Xt
from tests.student_train.places import in_float64
from tests.teacher_cache.engines.plain_inputs import build_inputs

KINDS = {"full": Full, "block_causal": BlockCausal, "x0_xt": X0Xt, "native": Native}
MASK = 96


@lru_cache
def teacher(user: str) -> Any:
    """A small Llama in float64; one for each who runs it, since an engine may change how its model attends."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(vocab_size=97, num_hidden_layers=2, initializer_range=0.3, **shape)
    config._attn_implementation = "sdpa"
    return in_float64(LlamaForCausalLM(config)).eval()


def attention_of(kind: str, block: int) -> Attention:
    return Full() if kind == "full" else KINDS[kind](block)


@st.composite
def examples(draw: Any, shift: int) -> list[Request]:
    """Passes of several examples: each of two CompDemo passes of up to four draws, in an order of their own."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(2, 30))
        rng = np.random.default_rng(draw(st.integers(0, 2**20)))
        ids = rng.integers(0, MASK, length).astype(np.int32)
        prompt = draw(st.integers(shift, length - 1))
        for _ in range(draw(st.integers(1, 4))):
            masked = np.flatnonzero(
                (rng.random(length) < rng.random()) & (np.arange(length) >= prompt)
            )
            part = rng.random(masked.size) < 0.5
            for read in (masked[part], masked[~part]):
                if read.size:
                    noised = ids.copy()
                    noised[read] = MASK
                    found.append(Request(noised, read.astype(np.int32), ids[read]))
    return draw(st.permutations(found))


def plain_logits(attention: Attention, request: Request, shift: int) -> torch.Tensor:
    """One whole sequence under the explicit mask."""
    inputs = build_inputs(attention, [request])
    model = teacher("plain")
    hidden = model.model(
        input_ids=inputs.ids,
        attention_mask=inputs.mask,
        position_ids=inputs.positions,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[0, inputs.columns - shift])


@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(max_examples=40)
@given(data=st.data())
def test_logits_are_those_of_whole_sequences_under_the_explicit_mask(kind: str, data: Any) -> None:
    shift = data.draw(st.integers(0, 1)) if kind in ("full", "block_causal") else 0
    attention, asked = attention_of(kind, data.draw(st.integers(1, 9))), data.draw(examples(shift))
    spec = TargetSpec(8, 1.0, (1.0,))
    budget = data.draw(st.sampled_from([1, 40, 10_000]))
    engine = TransformersEngine(
        teacher(kind), attention, spec, shift=bool(shift), tokens_per_batch=budget, head_rows=7
    )
    with torch.inference_mode():
        found: dict[int, torch.Tensor] = {}
        for packs in engine.batches(asked):
            members = [i for pack in packs for i in pack.members]
            logits = torch.cat([part for part, _ in engine._logits(packs, asked)])
            found |= dict(
                zip(members, logits.split([len(asked[i].read) for i in members]), strict=True)
            )
        assert sorted(found) == list(range(len(asked)))
        for i, request in enumerate(asked):
            torch.testing.assert_close(
                found[i], plain_logits(attention, request, shift), rtol=1e-9, atol=1e-9
            )
    for scores, request in zip(engine.score(asked), asked, strict=True):
        assert scores.gold_logp.size == len(request.read)


def conversations(count: int, draws: int) -> list[Request]:
    """Of 768 tokens, a third of them prompt: both CompDemo passes of every draw, t stratified."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        ids, offset = rng.integers(0, 1000, 768).astype(np.int32), rng.random()
        for draw in range(draws):
            t = (offset + draw / draws) % 1
            masked = np.flatnonzero((rng.random(768) < t) & (np.arange(768) >= 256))
            part = rng.random(masked.size) < 0.5
            for read in (masked[part], masked[~part]):
                if read.size:
                    noised = ids.copy()
                    noised[read] = 1001
                    found.append(Request(noised, read.astype(np.int32), ids[read]))
    return found


@pytest.mark.parametrize(
    ("kind", "before", "most"), [("native", 2, 0.4), ("x0_xt", 2, 0.4), ("block_causal", 1, 0.75)]
)
def test_rows_of_four_draws(kind: str, before: int, most: float) -> None:
    asked = conversations(50, 4)
    rows = sum(pack.width for pack in pack_requests(attention_of(kind, 32), asked, budget=16_384))
    assert rows <= most * sum(before * len(request.ids) for request in asked)


def test_nothing_is_padded_and_no_mask_is_made_under_full_attention() -> None:
    asked = conversations(3, 2)
    engine = TransformersEngine(
        teacher("full"), Full(), TargetSpec(8, 1.0, (1.0,)), tokens_per_batch=1600
    )
    rows = 0
    for packs in engine.batches(asked):
        batch = engine.batch(packs)
        rows += batch.arguments["input_ids"].numel()
        assert batch.arguments["attention_mask"].numel() == 0
    assert rows == sum(len(request.ids) for request in asked)


def test_the_row_before_the_first_is_never_asked() -> None:
    request = Request(
        np.array([MASK, 3], np.int32), np.array([0], np.int32), np.array([5], np.int32)
    )
    with pytest.raises(ValueError, match="no row predicts it"):
        pack_requests(Full(), [request], shift=1)


COMPILED = """
import sys
import numpy as np, torch
from torch._dynamo.utils import counters
from shared.models.checkpoint import open_checkpoint
from shared.models.loading import load_model
from teacher_cache.engines.transformers_engine import TransformersEngine
from teacher_cache.method.targets import TargetSpec
from teacher_cache.teachers.registry import Full, Native
from tests.teacher_cache.engines.test_engine import requests

worst, graphs = 0.0, []
for attention in (Full(), Native(8)):
    found = []
    for compiled in (False, True):
        counters.clear()
        model = load_model(open_checkpoint(sys.argv[1]), "llama", torch.float32)
        spec = TargetSpec(8, 1.0, (1.0,))
        engine = TransformersEngine(model, attention, spec, tokens_per_batch=90, compiled=compiled)
        scores = []
        for seed in range(4):
            scores += engine.score(requests(9, seed))
            graphs += [counters["stats"]["unique_graphs"]] if compiled and seed in (0, 3) else []
        found.append(np.concatenate([s.topk_logp.reshape(-1) for s in scores]))
    worst = max(worst, float(np.abs(found[0] - found[1]).max()))
print(worst, *graphs)
"""


@pytest.mark.slow
def test_compiled_layers_give_the_same_and_compile_once(random_teacher: Path) -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, str(random_teacher)], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    worst, *graphs = done.stdout.split()
    assert float(worst) < 1e-4
    assert (
        graphs[0] == graphs[1] and graphs[2] == graphs[3]
    )  # four lots of requests of other lengths: nothing anew
