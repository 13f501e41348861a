from __future__ import annotations

import os

import pytest
import torch

from shared.settings.objectives import Calm, Distillation, NoDistillation, ReverseCalm, Tidal
from student_train.losses.fused_head import LossSettings, fused_loss
from student_train.losses.liger_head import liger_fits, liger_installed, liger_loss
from tests.student_train.losses.test_fused_head import (
    doubled,
    expect_zero_where_nothing_is_masked,
    gradients,
    plain,
    problem,
)

pytestmark = [
    pytest.mark.skipif(
        not liger_installed(), reason="Liger is not installed: `make test-liger` brings it"
    ),
    pytest.mark.skipif(
        not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
        reason="Triton without a GPU needs TRITON_INTERPRET=1, which `make test-liger` sets",
    ),
    pytest.mark.filterwarnings("ignore"),  # Triton's interpreter warns about overflows of NumPy
]
OBJECTIVES: dict[str, Distillation] = {
    "ce": NoDistillation(),
    "calm": Calm(),
    "reverse_calm": ReverseCalm(),
    "calm_tidal": Calm(tidal=Tidal()),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equal_to_the_plain_loss_and_gradients(name: str) -> None:
    hidden, head, targets, counts = problem(41, 53, 16)
    settings = LossSettings(OBJECTIVES[name], 1.3, counts, 0.4)
    assert liger_fits(settings.distillation)
    found = gradients(lambda h, w: liger_loss(h, w, targets, settings)[0], hidden, head)
    sliced = gradients(lambda h, w: fused_loss(h, w, targets, settings, 7)[0], hidden, head)
    exact = gradients(
        lambda h, w: plain(h, w, doubled(targets), settings), hidden.double(), head.double()
    )
    for a, b, c in zip(found, sliced, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))
        torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-5 * float(c.abs().max()))


def test_nothing_masked_is_a_loss_of_zero_with_zero_gradients() -> None:
    expect_zero_where_nothing_is_masked(liger_loss, ReverseCalm())
