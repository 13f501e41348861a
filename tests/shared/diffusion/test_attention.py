import re
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from shared.diffusion.attention import block_causal, block_diffusion_places, full
from tests.plain_masks import block_diffusion


def test_reproduces_the_golden_masks(golden: Path) -> None:
    cases = load_file(golden / "bd3lm_masks.safetensors")
    assert cases
    for key, expected in cases.items():
        match = re.fullmatch(r"n(\d+)-block(\d+)-(xt_x0|x0_xt)", key)
        assert match is not None
        length, block = int(match[1]), int(match[2])
        order = "xt_x0" if match[3] == "xt_x0" else "x0_xt"
        assert torch.equal(block_diffusion(length, block, order), expected.bool())
        noised, clean = torch.arange(length), torch.arange(length, 2 * length)
        places = torch.cat([noised, clean] if order == "xt_x0" else [clean, noised])[None]
        assert torch.equal(block_diffusion_places(places, length, block)[0, 0], expected.bool())


@given(st.integers(1, 20), st.integers(1, 8))
def test_who_sees_whom(length: int, block: int) -> None:
    """Position by position, from the definition."""
    mask = block_diffusion_places(torch.arange(2 * length)[None], length, block)[0, 0]
    for q in range(2 * length):
        for k in range(2 * length):
            q_clean, k_clean = q >= length, k >= length
            q_block, k_block = q % length // block, k % length // block
            if q_clean:
                expected = k_clean and k_block <= q_block
            else:
                expected = k_block < q_block if k_clean else k_block == q_block
            assert bool(mask[q, k]) == expected


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 5))
def test_padding_is_seen_by_no_real_position_and_no_row_is_empty(
    lengths: list[int], block: int
) -> None:
    longest = max(lengths)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    both = valid.repeat(1, 2)
    places = torch.where(both, torch.arange(2 * longest), -1)
    for mask, keys in (
        (full(valid), valid),
        (block_causal(valid, block), valid),
        (block_diffusion_places(places, longest, block), both),
    ):
        assert mask.any(dim=-1).all()
        seen_padding = mask[:, 0] & keys[:, :, None] & ~keys[:, None, :]
        assert not seen_padding.any()
