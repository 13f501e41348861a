from __future__ import annotations

import math

import pytest
import torch

from shared.settings.objectives import Tidal
from student_train.losses.tidal import growth, strength_at, timestep_weight, training_strength


def test_growth_runs_from_zero_to_one() -> None:
    for kind in ("cosine", "linear"):
        values = [growth(i / 100, kind) for i in range(101)]
        assert (values[0], values[-1]) == (0, 1)
        assert values == sorted(values)
    assert growth(0.25, "cosine") == pytest.approx((1 - math.cos(math.pi / 4)) / 2)
    assert growth(0.25, "linear") == 0.25
    with pytest.raises(ValueError, match=r"progress is 1.5"):
        growth(1.5, "linear")


def test_strength_by_axis() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    half = training_strength(Tidal(), 0.5)
    assert half == pytest.approx(0.5)
    torch.testing.assert_close(strength_at(Tidal(axis="both"), half, t), half * (1 - t))
    torch.testing.assert_close(
        strength_at(Tidal(axis="training_only"), half, t), torch.full_like(t, half)
    )
    torch.testing.assert_close(strength_at(Tidal(axis="timestep_only"), half, t), 0.9 * (1 - t))
    assert training_strength(Tidal(), 0.0) == 0.1
    assert training_strength(Tidal(), 1.0) == pytest.approx(0.9)


def test_timestep_weight() -> None:
    t = torch.tensor([0.5, 0.65, 0.35])
    torch.testing.assert_close(
        timestep_weight("midrange", t), torch.tensor([1, math.exp(-0.5), math.exp(-0.5)])
    )
    assert timestep_weight("uniform", t).tolist() == [1, 1, 1]
