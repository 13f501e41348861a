"""Block diffusion sampling against whole passes without a cache, and what each pass reads; rows
that join others under way.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2ForCausalLM, SmolLM3ForCausalLM

from student_train.using.decoding import Decoding, Row
from student_train.using.elbo import ElboConfig, log_likelihoods
from student_train.using.settings import SampleConfig
from student_train.using.student import sample, sample_steps
from tests.student_train.places import SPECIAL, small, whole_logits

ENDLESS = replace(SPECIAL, eos=-1)
PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11, 12, 13, 14], [15], [16, 17, 18, 19]]
GREEDY = SampleConfig(new_tokens=16, block=4, steps_per_block=4)
RAGGED = SampleConfig(new_tokens=11, block=8, steps_per_block=3)
WARM = SampleConfig(new_tokens=16, block=4, steps_per_block=2, temperature=1.0, seed=3)
GUIDED = SampleConfig(new_tokens=16, block=8, threshold=0.05, guidance=1.5)
RANDOM = SampleConfig(new_tokens=16, block=4, steps_per_block=2, remasking="random")
CONFIGS = [GREEDY, RAGGED, WARM, GUIDED, RANDOM]


@pytest.fixture(scope="module")
def model() -> Any:
    return small()


def test_a_batch_of_unequal_prompts_is_each_alone_and_the_seed_decides(model: Any) -> None:
    for config in CONFIGS:
        together = sample(model, PROMPTS, SPECIAL, config)
        assert together == [sample(model, [prompt], SPECIAL, config)[0] for prompt in PROMPTS]
    other = replace(WARM, seed=4)
    assert sample(model, PROMPTS, SPECIAL, WARM) != sample(model, PROMPTS, SPECIAL, other)


def uncached(model: Any, prompt: list[int], config: SampleConfig) -> list[int]:
    """The same by whole passes over everything, nothing cached, in blocks from position 0."""
    ids, size = list(prompt), config.block
    while len(ids) < len(prompt) + config.new_tokens and SPECIAL.eos not in ids[len(prompt) :]:
        left = list(range(len(ids), (len(ids) // size + 1) * size))
        ids += [SPECIAL.mask] * len(left)
        steps = config.steps_per_block or size
        for step in range(steps):
            logits = whole_logits(model, ids, 0, size)
            logits[:, SPECIAL.mask] = -torch.inf
            confidence, tokens = logits.softmax(-1).max(-1)
            count = size // steps + (step < size % steps)
            for i in sorted(left, key=lambda i: -float(confidence[i]))[:count]:
                ids[i] = int(tokens[i])
                left.remove(i)
    new = ids[len(prompt) :][: config.new_tokens]
    return new[: new.index(SPECIAL.eos)] if SPECIAL.eos in new else new


@settings(max_examples=15)
@given(st.lists(st.integers(0, 46), min_size=1, max_size=13), st.sampled_from([GREEDY, RAGGED]))
def test_the_cache_changes_nothing(model: Any, prompt: list[int], config: SampleConfig) -> None:
    assert sample(model, [prompt], SPECIAL, config) == [uncached(model, prompt, config)]


@pytest.mark.parametrize("kind", [Qwen2ForCausalLM, SmolLM3ForCausalLM])
def test_every_kind_of_student_is_sampled_so(kind: Any) -> None:
    for prompt in PROMPTS:
        other = small(kind=kind)
        assert sample(other, [prompt], SPECIAL, GREEDY) == [uncached(other, prompt, GREEDY)]


@contextmanager
def calls(module: Any, note: Callable[[Any, Any], Any]) -> Iterator[list[Any]]:
    """What `note` says of the arguments of each call of the module."""
    seen: list[Any] = []
    hook = module.register_forward_pre_hook(
        lambda _module, args, named: seen.append(note(args, named)), with_kwargs=True
    )
    yield seen
    hook.remove()


def test_each_pass_reads_the_block_at_hand_and_the_head_its_masked_positions(model: Any) -> None:
    """The prompt goes through once, and each finished block; the head reads multiples of 32."""
    with calls(model.get_input_embeddings(), lambda args, _: args[0].shape[1]) as widths:
        *_, (_, passes) = sample_steps(model, [[1] * 9], ENDLESS, replace(GREEDY, new_tokens=15))
    assert passes == len(widths) == 3 + 3 * 4
    # Two whole blocks of the prompt; three of the response, the first with the prompt's end.
    assert sum(widths) == 8 + 12 + passes * GREEDY.block
    config = SampleConfig(new_tokens=64, block=64, steps_per_block=4)
    with calls(model.lm_head, lambda args, _: len(args[0])) as heads:
        list(sample_steps(model, [[1] * 64, [2] * 128], ENDLESS, config))
    assert heads == [128, 96, 64, 32]


def test_the_end_of_turn_ends_an_answer_and_padding_is_never_sampled(model: Any) -> None:
    (whole,) = sample(model, [[1] * 8], ENDLESS, GREEDY)
    end = whole[5]
    ending = replace(ENDLESS, ends=(end,))
    assert sample(model, [[1] * 8], ending, GREEDY) == [whole[: whole.index(end)]]
    prompt, many = [1] * 8 + [end], replace(GREEDY, new_tokens=3, min_new_tokens=3)
    assert len(sample(model, [prompt], ending, many)[0]) == 3  # the prompt's own is no end
    (longer,) = sample(model, [[1] * 8], ending, replace(GREEDY, min_new_tokens=9))
    assert end not in longer and len(longer) >= 9
    (answer,) = sample(model, [[1] * 8], replace(ENDLESS, vocabulary=max(whole)), GREEDY)
    assert max(answer) < max(whole)


def test_the_mask_is_never_emitted_and_an_end_not_before_its_time() -> None:
    """By a model that likes them best."""
    liking = small()
    with torch.no_grad():
        liking.lm_head.weight[SPECIAL.mask] *= 50
        liking.lm_head.weight[SPECIAL.eos] = 5.0
    for config in CONFIGS:
        *_, (tokens, _) = sample_steps(liking, PROMPTS, SPECIAL, config)
        for row in tokens:
            assert SPECIAL.mask not in row and len(row) <= config.new_tokens
            first = row.index(SPECIAL.eos) if SPECIAL.eos in row else len(row)
            assert all(token == SPECIAL.eos for token in row[first:])
    free = SampleConfig(new_tokens=16, block=4)
    assert any(len(row) < 6 for row in sample(liking, PROMPTS, SPECIAL, free))
    held = sample(liking, PROMPTS, SPECIAL, replace(free, min_new_tokens=6))
    assert all(len(row) >= 6 for row in held) and any(len(row) < 16 for row in held)


def test_rows_that_have_ended_cost_nothing_more(model: Any) -> None:
    """What the others get is the same."""
    config = SampleConfig(new_tokens=11, block=4, guidance=0.5)
    alone = sample(model, PROMPTS[1:2], ENDLESS, config)

    def stop(row: int, tokens: list[int]) -> bool:
        return row in (0, 2) or (row == 3 and len(tokens) == 8)

    with calls(model.get_input_embeddings(), lambda args, _: len(args[0])) as sizes:
        *_, (tokens, _) = sample_steps(model, PROMPTS, ENDLESS, config, stop)
    # The first block has three new tokens of row 1, four of row 3.
    assert sizes == [8] * 4 + [4] * 4 + [2] * 4
    assert tokens[1] == alone[0] and len(alone[0]) == 11
    assert (len(tokens[0]), len(tokens[3])) == (3, 8)


def test_a_limit_cuts_a_whole_block_and_costs_no_more_than_it_keeps(model: Any) -> None:
    """What is kept is what a longer response begins with."""
    long = sample(model, PROMPTS, ENDLESS, replace(GREEDY, new_tokens=24))
    for limit in range(1, 17):
        cut = replace(GREEDY, new_tokens=limit)
        assert sample(model, PROMPTS, ENDLESS, cut) == [row[:limit] for row in long]
    first = SampleConfig(new_tokens=1, block=32)
    *_, (_, passes) = sample_steps(model, PROMPTS[:1], ENDLESS, first)
    assert passes < 32 - len(PROMPTS[0])


def test_a_threshold_settles_at_least_one_a_step_and_saves_passes(model: Any) -> None:
    never = SampleConfig(new_tokens=8, block=8, threshold=0.999)
    steps = sample_steps(model, [[1] * 8], ENDLESS, never)
    left = [tokens[0].count(SPECIAL.mask) for tokens, _ in steps]
    assert left == [7, 6, 5, 4, 3, 2, 1, 0, 0]
    always = replace(never, threshold=0.0)
    *_, (_, passes) = sample_steps(model, [[1] * 8], SPECIAL, always)
    assert passes == 1


@settings(max_examples=40)
@given(st.integers(0, 2**20), st.none() | st.integers(1, 60), st.floats(0.01, 1), st.floats(0.3, 3))
def test_what_is_sampled_lies_in_top_k_and_top_p(
    model: Any, seed: int, top_k: int | None, top_p: float, warmth: float
) -> None:
    """Settled in one step: each token is among the top_k; likelier ones have less than top_p."""
    how: dict[str, Any] = {"temperature": warmth, "top_k": top_k, "top_p": top_p, "seed": seed}
    config = SampleConfig(8, block=8, steps_per_block=1, **how)
    *_, (tokens, _) = sample_steps(model, [[*PROMPTS[0], 6, 7, 8]], ENDLESS, config)
    ids = [*PROMPTS[0], 6, 7, 8] + [SPECIAL.mask] * 8
    logits = whole_logits(model, ids, 0, 8)[-8:]
    logits[:, SPECIAL.mask] = -torch.inf
    order = logits.argsort(dim=1, descending=True)
    place = (order == torch.tensor(tokens[0])[:, None]).int().argmax(dim=1)
    kept = (logits / warmth).gather(1, order)[:, :top_k].softmax(dim=1)
    assert (place < kept.shape[1]).all()
    likelier = (kept.cumsum(dim=1) - kept).gather(1, place[:, None])
    assert (likelier < top_p + 1e-5).all()


def test_what_cannot_work_is_refused(model: Any) -> None:
    for changes in ({"new_tokens": 8, "min_new_tokens": 9}, {"steps_per_block": 33}, {"top_k": -2}):
        with pytest.raises(ValueError, match=next(reversed(changes))):
            SampleConfig(**changes)  # type: ignore[arg-type]
    for call in (
        lambda: sample(model, [[1], []], SPECIAL, GREEDY),
        lambda: log_likelihoods(model, [([], [[1]])], SPECIAL, ElboConfig()),
        lambda: log_likelihoods(model, [([1], [[1], []])], SPECIAL, ElboConfig()),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            call()


BLOCK = 4
WAYS: list[dict[str, Any]] = [
    {},
    {"steps_per_block": 1},
    {"threshold": 0.03},
    {"remasking": "random", "seed": 5},
    {"temperature": 1.0, "seed": 4, "top_k": 3, "top_p": 0.4},
    {"temperature": 1.3, "remasking": "random", "min_new_tokens": 3},
]
PROMPT = st.lists(st.integers(1, 20), min_size=1, max_size=11)
REQUESTS = st.lists(st.tuples(PROMPT, st.sampled_from(WAYS), st.integers(1, 4)), max_size=3)


@pytest.fixture(scope="module")
def exact() -> Any:
    """In float64: what differs by rounding alone does not differ."""
    return small().double()


def advance(decoding: Decoding) -> None:
    list(decoding.next_block())
    decoding.keep([len(row.made) < row.config.new_tokens for row in decoding.rows])


@settings(max_examples=40)
@given(arrivals=st.lists(REQUESTS, min_size=1, max_size=4), guidance=st.sampled_from([0.0, 0.8]))
def test_a_row_that_joins_is_as_alone(exact: Any, arrivals: list[Any], guidance: float) -> None:
    """Every block some come, with settings and lengths of their own; those that are done leave."""
    decoding = Decoding(exact, ENDLESS, SampleConfig(block=BLOCK, guidance=guidance))
    every: list[Row] = []
    for coming in [*arrivals, *[[]] * 5]:  # none takes more than five blocks
        rows = [Row(p, SampleConfig(BLOCK * n, block=BLOCK, **way)) for p, way, n in coming]
        every += rows
        if rows:
            decoding.join(rows)
        if decoding.rows:
            advance(decoding)
    assert not decoding.rows
    for row in every:
        config = replace(row.config, guidance=guidance)
        *_, (tokens, _) = sample_steps(exact, [row.prompt], ENDLESS, config)
        assert row.made == tokens[0]


class Waits(TorchDispatchMode):
    """Counts what a GPU's caller waits for: values and sizes that are read from it, and tensors
    that are made of Python's numbers and sent to it.
    """

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        reads = name in ("_local_scalar_dense", "nonzero", "masked_select")
        indices = args[1] if name in ("index", "index_put_") else []
        reads |= any(x is not None and x.dtype == torch.bool for x in indices)
        # A number goes along with the kernel, and of nothing (an empty cache) nothing is copied.
        self.count += reads or (name == "lift_fresh" and args[0].dim() > 0 < args[0].numel())
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Tells `Waits` of the reads that a CPU's tensors need no operator for."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits.count += getattr(func, "__name__", "") in ("tolist", "cpu", "numpy")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("guidance", [0.0, 0.8])
def test_a_step_waits_for_the_device_at_most_twice(model: Any, guidance: float) -> None:
    """On average over a block, and in each step but the first, which has what is made once."""
    rows = [Row([5] * 4, SampleConfig(8, block=8, **way)) for way in WAYS if "threshold" not in way]
    decoding = Decoding(model, ENDLESS, SampleConfig(block=8, guidance=guidance))
    decoding.join(rows)
    with Waits() as waits, Reads(waits):
        counts = [waits.count for _ in decoding.next_block()]
    assert len(counts) == 5 and counts[-1] <= 2 * 5
    assert all(after - before <= 2 for before, after in itertools.pairwise(counts[:-1]))


def test_compiled_passes_are_one_graph_of_few_shapes_and_change_nothing(
    exact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, shapes, compile_ = [], set(), torch.compile

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)

        def run(*args: Any) -> Any:
            shapes.add(tuple(x.shape for x in args if isinstance(x, torch.Tensor) and x.dim() == 4))
            return graph(*args)

        return run

    def compiled(module: Any, dynamic: bool, mode: str) -> Any:
        return compile_(module, dynamic=dynamic, backend=backend)

    monkeypatch.setattr(torch, "compile", compiled)
    for prompts in (PROMPTS[:3], [[7] * 18, [8] * 5, [9] * 11]):
        for way in ({}, {"steps_per_block": 2, "guidance": 0.8}):
            config = SampleConfig(new_tokens=24, block=BLOCK, **way)  # type: ignore[arg-type]
            wanted = sample(exact, prompts, ENDLESS, config)
            assert sample(exact, prompts, ENDLESS, replace(config, compile=True)) == wanted
    assert len(graphs) == 1
    # Rows 3 and 6; with and without the last block; a cache of 8 blocks, or of 16.
    assert len(shapes) <= 2 * 2 * 2


def test_who_joins_costs_one_pass_and_padding_that_nobody_needs_is_given_up(exact: Any) -> None:
    """One pass over a prompt but for its last block, which goes through with the first new one."""
    config = SampleConfig(new_tokens=12, block=BLOCK, steps_per_block=1)
    decoding = Decoding(exact, ENDLESS, config)
    with calls(exact.get_input_embeddings(), lambda args, _: tuple(args[0].shape)) as shapes:
        decoding.join([Row([1] * 8, config)])
        advance(decoding)
        decoding.join([Row([2] * 15, config), Row([3], config)])
        advance(decoding)
        decoding.join([Row([4] * 3, config)])
    assert shapes == [(1, 8 + BLOCK), (2, 8), (3, BLOCK + BLOCK)]
    assert decoding.passes == 3
    decoding = Decoding(exact, ENDLESS, config)  # of a server that always has work
    with calls(exact.model.layers[0], lambda _, how: how["attention_mask"].shape[-1]) as keys:
        for _ in range(12):
            decoding.join([Row([1, 2, 3], config)])
            advance(decoding)
    assert len(keys) >= 12 and max(keys) <= 5 * BLOCK
