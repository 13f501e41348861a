from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_mask, flex_attention

from shared.attention import block_diffusion_batch
from student_train.model.attention import FLEX, flex_mask, register_flex
from student_train.model.student import masked_hidden
from tests.student_train.model.test_student import small

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # by the tracer itself
]


def ragged(lengths: list[int]) -> torch.Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


@settings(max_examples=20)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 9))
def test_the_block_mask_is_the_dense_one(lengths: list[int], block: int) -> None:
    valid = ragged(lengths)
    made = flex_mask(valid, block)
    double = 2 * valid.shape[1]
    dense = create_mask(made.mask_mod, len(lengths), 1, double, double, device="cpu")
    assert dense.equal(block_diffusion_batch(valid, block))


def inputs(lengths: list[int], seed: int = 0) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(seed)
    valid = ragged(lengths)
    clean = torch.randint(0, 49, valid.shape, generator=g)
    row, column = (valid & (torch.rand(valid.shape, generator=g) < 0.5)).nonzero(as_tuple=True)
    noised = clean.clone()
    noised[row, column] = 49
    return noised, clean, valid, row, column


def test_flex_and_sdpa_agree_in_values_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses gradients of flex_attention on a CPU, though its dense form has them: so the guard is lifted."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    register_flex()
    model = small()
    batch = inputs([37, 64, 5])
    found = []
    for name in ("sdpa", FLEX):
        model.set_attn_implementation(name)
        model.zero_grad()
        hidden = masked_hidden(model, *batch, block=8)
        (hidden * torch.linspace(-1, 1, hidden.numel()).reshape(hidden.shape)).sum().backward()
        found.append((hidden.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    for a, b in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_padding_does_not_change_values() -> None:
    register_flex()
    model = small().requires_grad_(False)
    model.set_attn_implementation(FLEX)
    noised, clean, valid, row, column = inputs([37, 64, 5])
    together = masked_hidden(model, noised, clean, valid, row, column, block=8)
    for i, n in enumerate([37, 64, 5]):
        mine = row == i
        alone = masked_hidden(
            model, noised[i : i + 1, :n], clean[i : i + 1, :n], valid[i : i + 1, :n],
            torch.zeros_like(row[mine]), column[mine], block=8,
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
            out = attend(q, k, v, block_mask=flex_mask(valid, 8))
            dense = block_diffusion_batch(valid, 8)
            expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        return counter.frame_count

    few = graphs_after([[64, 40], [64, 40, 7], [96, 33], [128, 3, 4]])
    assert few <= 4
    assert graphs_after([[200, 33, 5], [128] * 4, [160, 7, 9, 1, 3], [150, 2], [32] * 3, [250] * 5, [256, 9]]) == few
