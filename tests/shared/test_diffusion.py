"""Draws are pure and well spread; masks are those of the reference."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from shared import diffusion
from shared.diffusion import chunk_draw, diffusion_time, token_draw


@given(st.integers(0, 2**40), st.text(max_size=12))
def test_any_power_of_two_prefix_of_draws_is_stratified(seed: int, example: str) -> None:
    """One draw in each of 1, 2, 4 … equal strata of the circle, for every example."""
    for draws in (1, 2, 8):
        t = np.sort([diffusion_time(seed, example, d) for d in range(draws)])
        assert t[0] >= diffusion.TIME_EPSILON and t[-1] < 1
        gaps = np.diff(t, append=t[0] + 1 - diffusion.TIME_EPSILON) / (1 - diffusion.TIME_EPSILON)
        assert np.allclose(gaps, 1 / draws)


def test_time_is_uniform_over_examples() -> None:
    times = np.sort([diffusion_time(0, str(i), 1) for i in range(2000)])
    # Kolmogorov–Smirnov at p ≈ 0.003
    assert np.abs(times - (np.arange(2000) + 0.5) / 2000).max() < 0.04


def test_each_token_is_masked_with_probability_t() -> None:
    draws = [token_draw(1, f"e{i}", 0, np.arange(10, 210), 0.5) for i in range(300)]
    deviation = [(d.masked.size - 200 * d.t) / np.sqrt(200 * d.t * (1 - d.t) + 1e-9) for d in draws]
    assert abs(np.mean(deviation)) < 4 / np.sqrt(300)
    assert 0.8 < np.std(deviation) < 1.2
    assert all(d.masked.min() >= 10 for d in draws if d.masked.size)


def test_the_bits_are_fixed_forever() -> None:
    """A cache's draws must be the same on every machine and in every version: frozen numbers."""
    draw = token_draw(7, "example", 3, np.arange(2, 40), 0.5)
    assert draw.t == pytest.approx(0.7032318824776035, abs=1e-15)
    assert sorted(set(range(2, 40)) - set(draw.masked.tolist())) == [14, 15, 17, 20, 31, 37]
    assert draw.split[:12].tolist() == [True] * 3 + [False] * 4 + [True] * 4 + [False]


sizes = st.lists(st.integers(1, 5), min_size=1, max_size=30)


@given(st.integers(0, 10_000), sizes, st.integers(0, 6))
def test_chunk_masks_are_whole_chunks(seed: int, lengths: list[int], first: int) -> None:
    edges = np.cumsum([0, *lengths]) + 3  # tokens 0 … 2 and the last two stand outside all chunks
    spans = np.stack([edges[:-1], edges[1:]], axis=1)
    length = int(edges[-1]) + 2
    draw = chunk_draw(seed, "x", 0, np.arange(first, length), length, spans, 0.5)
    masked = set(draw.masked.tolist())
    for i, (start, end) in enumerate(spans.tolist()):
        active = i in draw.chunks.tolist()
        if start >= first:
            assert {p in masked for p in range(start, end)} == {active}  # whole or not at all
        else:
            assert not active  # a chunk with a prompt token
    assert all(p >= first for p in masked)
    assert masked >= set(token_draw(seed, "x", 0, np.arange(first, length), 0.5).masked.tolist())
    assert draw.split.size == draw.chunks.size
    # Not whole: the tokens' own masks, and the chunks that these cover.
    alone = chunk_draw(seed, "x", 0, np.arange(first, length), length, spans, 0.5, whole=False)
    tokens = token_draw(seed, "x", 0, np.arange(first, length), 0.5).masked
    assert alone.masked.tolist() == tokens.tolist() and alone.split.size == alone.chunks.size
    covered = [{*range(start, end)} <= {*tokens.tolist()} for start, end in spans.tolist()]
    assert alone.chunks.tolist() == np.flatnonzero(covered).tolist()


def test_demo_ratio_is_the_share_of_part_a() -> None:
    for ratio in (0.0, 0.3, 1.0):
        splits = [token_draw(0, str(i), 0, np.arange(200), ratio).split for i in range(60)]
        assert np.concatenate(splits).mean() == pytest.approx(ratio, abs=0.03)
    nothing = chunk_draw(0, "x", 0, np.arange(0), 5, np.zeros((0, 2), np.int32), 0.5)
    assert nothing.masked.size == nothing.chunks.size == nothing.split.size == 0


def test_reproduces_the_golden_masks(golden: Path) -> None:
    cases = load_file(golden / "bd3lm_masks.safetensors")
    assert cases
    for key, expected in cases.items():
        name, width, order = key.split("-")
        length, block = int(name.removeprefix("n")), int(width.removeprefix("block"))
        noised, clean = torch.arange(length), torch.arange(length, 2 * length)
        places = torch.cat({"xt_x0": [noised, clean], "x0_xt": [clean, noised]}[order])[None]
        mask = diffusion.block_diffusion_places(places, length, block)[0, 0]
        assert torch.equal(mask, expected.bool())


@given(st.integers(1, 20), st.integers(1, 8))
def test_who_sees_whom(length: int, block: int) -> None:
    """Position by position, from the definition."""
    mask = diffusion.block_diffusion_places(torch.arange(2 * length)[None], length, block)[0, 0]
    q, k = np.indices(mask.shape)
    q_block, k_block = q % length // block, k % length // block
    to_clean = np.where(q >= length, k_block <= q_block, k_block < q_block)
    to_noised = (q < length) & (k_block == q_block)
    assert np.array_equal(mask, np.where(k >= length, to_clean, to_noised))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 5))
def test_padding_is_seen_by_no_real_position_and_no_row_is_empty(
    lengths: list[int], block: int
) -> None:
    longest = max(lengths)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    both = valid.repeat(1, 2)
    places = torch.where(both, torch.arange(2 * longest), -1)
    once = [(diffusion.full(valid), valid), (diffusion.block_causal(valid, block), valid)]
    for mask, keys in [*once, (diffusion.block_diffusion_places(places, longest, block), both)]:
        assert mask.any(dim=-1).all()
        seen_padding = mask[:, 0] & keys[:, :, None] & ~keys[:, None, :]
        assert not seen_padding.any()
