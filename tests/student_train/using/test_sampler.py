from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.using.settings import SampleConfig, Special
from student_train.using.student import sample, sample_steps
from tests.student_train.model.test_student import small

SPECIAL = Special(mask=49, pad=47, eos=48)
PROMPTS = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11, 12, 13, 14], [15], [16, 17, 18, 19]]
CONFIGS = {
    "greedy": SampleConfig(new_tokens=16, block=4, steps_per_block=4),
    "uneven": SampleConfig(new_tokens=16, block=8, steps_per_block=3),
    "threshold": SampleConfig(new_tokens=16, block=8, threshold=0.05),
    "random": SampleConfig(new_tokens=16, block=4, steps_per_block=2, remasking="random"),
    "warm": SampleConfig(new_tokens=16, block=4, steps_per_block=2, temperature=1.0, seed=3),
    "nucleus": SampleConfig(
        new_tokens=16, block=4, steps_per_block=2, temperature=1.0, top_p=0.7, top_k=9
    ),
    "ragged": SampleConfig(new_tokens=11, block=4, steps_per_block=2),
    "three": SampleConfig(new_tokens=3, block=8),
    "guided": SampleConfig(new_tokens=16, block=4, steps_per_block=4, guidance=1.5),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return small()


def test_a_batch_of_unequal_prompts_is_each_alone(model: Any) -> None:
    for config in CONFIGS.values():
        together = sample(model, PROMPTS, SPECIAL, config)
        assert together == [sample(model, [prompt], SPECIAL, config)[0] for prompt in PROMPTS]


def whole_logits(model: Any, ids: list[int], padding: int, block: int) -> torch.Tensor:
    """By one pass over everything, in float64; `padding` tokens on the left are hidden, no mask
    token is likely.
    """
    index = torch.arange(len(ids)) // block
    seen = (index[:, None] >= index[None]) & (torch.arange(len(ids)) >= padding)[None]
    seen |= torch.eye(len(ids), dtype=torch.bool)
    with torch.no_grad():
        hidden = model.model(
            input_ids=torch.tensor([ids]), attention_mask=seen[None, None], use_cache=False
        )
        logits = model.lm_head(hidden.last_hidden_state)[0].double()
    logits[:, SPECIAL.mask] = -torch.inf
    return logits


def uncached(model: Any, prompt: list[int], config: SampleConfig) -> list[int]:
    """The same by whole passes over everything, in float64, nothing cached."""
    width = -(-len(prompt) // config.block) * config.block
    ids = [SPECIAL.pad] * (width - len(prompt)) + prompt
    for start in range(0, config.new_tokens, config.block):
        size = min(config.block, config.new_tokens - start)
        ids += [SPECIAL.mask] * size
        steps = min(size, config.steps_per_block or size)
        for step in range(steps):
            logits = whole_logits(model, ids, width - len(prompt), config.block)[-size:]
            confidence, tokens = logits.softmax(-1).max(-1)
            left = [i for i in range(size) if ids[i - size] == SPECIAL.mask]
            count = size // steps + (step < size % steps)
            for i in sorted(left, key=lambda i: -float(confidence[i]))[:count]:
                ids[i - size] = int(tokens[i])
        if SPECIAL.eos in ids[width:]:
            break
    new = ids[width:]
    return new[: new.index(SPECIAL.eos)] if SPECIAL.eos in new else new


@settings(max_examples=15, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 46), min_size=1, max_size=13),
    name=st.sampled_from(["greedy", "uneven", "ragged", "three"]),
)
def test_the_cache_changes_nothing(model: Any, prompt: list[int], name: str) -> None:
    assert sample(model, [prompt], SPECIAL, CONFIGS[name]) == [
        uncached(model, prompt, CONFIGS[name])
    ]


def test_the_mask_token_is_never_emitted() -> None:
    """Even by a model that likes it best."""
    liking = small()
    with torch.no_grad():
        liking.lm_head.weight[SPECIAL.mask] *= 50
    for config in CONFIGS.values():
        *_, (tokens, _) = sample_steps(liking, PROMPTS, SPECIAL, config)
        assert (tokens != SPECIAL.mask).all()
        assert tokens.shape[1] <= 16


def test_the_prefix_is_encoded_once(model: Any) -> None:
    """What goes through the model: the prompt once, each finished block once, the block at hand
    once a step.
    """
    config = CONFIGS["greedy"]
    seen: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _m, args, _o: seen.append(args[0].shape[1])
    )
    states = list(sample_steps(model, [[1] * 9], dataclasses.replace(SPECIAL, eos=-1), config))
    hook.remove()
    passes = states[-1][1]
    assert passes == len(seen) == 16
    finished_before_the_last = 12
    assert sum(seen) == 12 + finished_before_the_last + passes * config.block
    assert max(seen) <= 12 + config.block


def test_the_head_reads_masked_positions_alone(model: Any) -> None:
    """In whole multiples of 32 rows."""
    rows: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    config = SampleConfig(new_tokens=64, block=64, steps_per_block=4)
    list(sample_steps(model, PROMPTS[:2], dataclasses.replace(SPECIAL, eos=-1), config))
    hook.remove()
    assert rows == [128, 96, 64, 32]


def test_an_end_in_every_row_ends_it_and_nothing_follows_an_end() -> None:
    ending = small()
    with torch.no_grad():
        ending.lm_head.weight[:] = 0
        ending.lm_head.weight[SPECIAL.eos] = ending.model.norm.weight * 0 + 1
        ending.lm_head.weight[5] = -ending.lm_head.weight[SPECIAL.eos]
    config = SampleConfig(new_tokens=32, block=4, steps_per_block=4)
    *_, (tokens, _) = sample_steps(ending, PROMPTS, SPECIAL, config)
    for row in tokens.tolist():
        first = row.index(SPECIAL.eos) if SPECIAL.eos in row else len(row)
        assert all(token == SPECIAL.eos for token in row[first:])
    assert all(SPECIAL.eos not in row for row in sample(ending, PROMPTS, SPECIAL, config))


def test_rows_that_have_ended_cost_nothing_more(model: Any) -> None:
    """By an EOS, or because they need no more; what the others get is the same."""
    config = SampleConfig(new_tokens=12, block=4, guidance=0.5)
    endless = dataclasses.replace(SPECIAL, eos=-1)
    alone = sample(model, PROMPTS[1:2], endless, config)
    sizes: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _m, args, _o: sizes.append(len(args[0]))
    )
    asked: list[tuple[int, int]] = []

    def stop(row: int, tokens: list[int]) -> bool:
        asked.append((row, len(tokens)))
        return row in (0, 2) or (row == 3 and len(tokens) == 8)

    *_, (tokens, _) = sample_steps(model, PROMPTS, endless, config, stop)
    hook.remove()
    assert sizes == [8] * 4 + [4] * 4 + [2] * 4
    assert asked == [(0, 4), (1, 4), (2, 4), (3, 4), (1, 8), (3, 8), (1, 12)]
    assert tokens[1].tolist() == alone[0]
    assert (tokens[0, 4:] == -1).all() and (tokens[3, 8:] == -1).all()


def test_no_end_before_the_least_number_of_tokens() -> None:
    ending = small()
    with torch.no_grad():
        ending.lm_head.weight[SPECIAL.eos] = ending.lm_head.weight[SPECIAL.eos] * 0 + 5
    free = SampleConfig(new_tokens=16, block=4)
    assert any(len(row) < 6 for row in sample(ending, PROMPTS, SPECIAL, free))
    held = dataclasses.replace(free, min_new_tokens=6)
    assert all(len(row) >= 6 for row in sample(ending, PROMPTS, SPECIAL, held))
    assert any(len(row) < 16 for row in sample(ending, PROMPTS, SPECIAL, held))


def test_a_threshold_settles_at_least_one_a_step_and_saves_passes(model: Any) -> None:
    never = SampleConfig(new_tokens=8, block=8, threshold=0.999)
    states = [
        tokens
        for tokens, _ in sample_steps(
            model, PROMPTS[:1], dataclasses.replace(SPECIAL, eos=-1), never
        )
    ]
    left = [int((tokens == SPECIAL.mask).sum()) for tokens in states]
    assert left == [7, 6, 5, 4, 3, 2, 1, 0, 0]
    always = dataclasses.replace(never, threshold=0.0)
    *_, (_, passes) = sample_steps(model, PROMPTS[:1], SPECIAL, always)
    assert passes == 1


def test_the_seed_decides(model: Any) -> None:
    warm = CONFIGS["warm"]
    assert sample(model, PROMPTS, SPECIAL, warm) == sample(model, PROMPTS, SPECIAL, warm)
    assert sample(model, PROMPTS, SPECIAL, warm) != sample(
        model, PROMPTS, SPECIAL, dataclasses.replace(warm, seed=4)
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    top_k=st.none() | st.integers(1, 60),
    top_p=st.floats(0.01, 1.0),
    temperature=st.floats(0.3, 3.0),
)
def test_what_is_sampled_lies_in_top_k_and_top_p(
    model: Any, seed: int, top_k: int | None, top_p: float, temperature: float
) -> None:
    """A block settled in one step: each token is among the top_k; likelier ones together have less
    than top_p.
    """
    config = SampleConfig(
        8, block=8, steps_per_block=1, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    endless = dataclasses.replace(SPECIAL, eos=-1)
    *_, (tokens, _) = sample_steps(model, [PROMPTS[0]], endless, config)
    ids = [SPECIAL.pad] * 3 + PROMPTS[0] + [SPECIAL.mask] * 8
    logits = whole_logits(model, ids, 3, 8)[-8:]
    order = logits.argsort(dim=1, descending=True)
    place = (order == tokens[0][:, None]).int().argmax(dim=1)
    kept = (logits / temperature).gather(1, order)[:, :top_k].softmax(dim=1)
    assert (place < kept.shape[1]).all()
    likelier = (
        kept.cumsum(dim=1).gather(1, place[:, None])[:, 0] - kept.gather(1, place[:, None])[:, 0]
    )
    assert (likelier < top_p + 1e-5).all()


def test_settings_that_cannot_work() -> None:
    for changes in (
        {"new_tokens": 0},
        {"new_tokens": 8, "min_new_tokens": 9},
        {"steps_per_block": 33},
        {"temperature": -1.0},
        {"threshold": 1.0},
        {"top_k": 0},
        {"top_p": 1.1},
    ):
        with pytest.raises(ValueError, match=next(reversed(changes))):
            SampleConfig(**changes)  # type: ignore[arg-type]


def test_an_empty_prompt(model: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        sample(model, [[1], []], SPECIAL, CONFIGS["greedy"])
