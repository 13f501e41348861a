from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_mask, flex_attention

from shared.diffusion.attention import block_diffusion, block_diffusion_places
from student_train.model.student import FLEX, flex_mask, masked_hidden
from tests.student_train.model.test_student import places_of, small
from tests.student_train.places import all_places

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf"
    ),  # by the tracer itself
]


def ragged(lengths: list[int]) -> torch.Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


lists_of_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=3)


@settings(max_examples=20)
@given(lists_of_lengths, st.integers(1, 9), st.randoms(use_true_random=False))
def test_the_block_mask_is_the_dense_one(lengths: list[int], block: int, random: Any) -> None:
    width = max(lengths)
    places = all_places(lengths)
    kept = sorted(random.sample(range(2 * width), random.randint(1, 2 * width)))
    for chosen in (places, places[:, kept]):
        made = flex_mask(chosen, width, block)
        dense = create_mask(made.mask_mod, len(lengths), 1, *[chosen.shape[1]] * 2, device="cpu")
        assert dense.equal(block_diffusion_places(chosen, width, block))


@given(lists_of_lengths, st.integers(1, 9))
def test_between_all_places_it_is_the_mask_of_block_diffusion(
    lengths: list[int], block: int
) -> None:
    width, places = max(lengths), all_places(lengths)
    found, whole = block_diffusion_places(places, width, block)[:, 0], block_diffusion(width, block)
    for i in range(len(lengths)):
        real = places[i] >= 0
        assert found[i][real][:, real].equal(whole[real][:, real])
        assert found[i][:, ~real].sum() == (~real).sum() and found[i].any(dim=1).all()


def inputs(lengths: list[int], seed: int = 0) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    valid = ragged(lengths)
    clean = torch.randint(0, 49, valid.shape, generator=g)
    row, column = (valid & (torch.rand(valid.shape, generator=g) < 0.5)).nonzero(as_tuple=True)
    noised = clean.clone()
    noised[row, column] = 49
    return noised, clean, valid, row, column


def hidden_of(
    model: Any, noised: Any, clean: Any, valid: Any, row: Any, column: Any
) -> torch.Tensor:
    places, place = places_of(valid, row, column, 8)
    return masked_hidden(model, noised, clean, places, row, place, block=8)


def test_flex_and_sdpa_agree_in_values_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses gradients of flex_attention on a CPU, though its dense form has them: so the guard is lifted."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    model = small()
    batch = inputs([37, 64, 5])
    found = []
    for name in ("sdpa", FLEX):
        model.set_attn_implementation(name)
        model.zero_grad()
        hidden = hidden_of(model, *batch)
        (hidden * torch.linspace(-1, 1, hidden.numel()).reshape(hidden.shape)).sum().backward()
        found.append(
            (hidden.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None])
        )
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    for a, b in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_padding_does_not_change_values() -> None:
    model = small().requires_grad_(False)
    model.set_attn_implementation(FLEX)
    noised, clean, valid, row, column = inputs([37, 64, 5])
    together = hidden_of(model, noised, clean, valid, row, column)
    for i, n in enumerate([37, 64, 5]):
        mine = row == i
        alone = hidden_of(
            model, noised[i : i + 1, :n], clean[i : i + 1, :n], valid[i : i + 1, :n],
            torch.zeros_like(row[mine]), column[mine],
        )  # fmt: skip
        torch.testing.assert_close(together[mine], alone, rtol=1e-5, atol=1e-5)


def test_new_lengths_compile_nothing_anew() -> None:
    """Traced as on CUDA, by a backend that counts. A few shapes are special to the tracer (one tile only; a batch size
    that is also the number of heads) and may make a graph of their own; after them any batch must do with these.
    """
    counter = CompileCounter()
    attend: Any = torch.compile(flex_attention, backend=counter, dynamic=True)
    torch._dynamo.reset()

    def graphs_after(widths: list[list[int]]) -> int:
        for lengths in widths:
            valid = ragged(lengths)
            batch, length = valid.shape
            q, k, v = torch.randn(3, batch, 2, 2 * length, 16)
            places = all_places(lengths)
            out = attend(q, k, v, block_mask=flex_mask(places, length, 8))
            dense = block_diffusion_places(places, length, 8)
            expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        return counter.frame_count

    few = graphs_after([[64, 40], [64, 40, 7], [96, 33], [128, 3, 4]])
    assert few <= 4
    assert (
        graphs_after(
            [[200, 33, 5], [128] * 4, [160, 7, 9, 1, 3], [150, 2], [32] * 3, [250] * 5, [256, 9]]
        )
        == few
    )
