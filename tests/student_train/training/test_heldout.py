"""The held-out scores against their definition, in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.training.heldout import HeldOut, masked_nll


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.booleans())
def test_scores_are_what_they_say(seed: int, batches: int, special: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    held, answers = [], []
    for _ in range(batches):
        clean = torch.randint(7, (2, 5), generator=generator)
        row, column = torch.tensor([0, 0, 1]), torch.tensor([1, 4, 2])
        sizes = torch.randint(0 if special else 1, 4, (3,), generator=generator)
        answers.append(torch.randn(3, 7, generator=generator, dtype=torch.float64))
        held.append({"clean": clean, "row": row, "column": column, "bytes": sizes})
    given_out = iter(answers)
    model = torch.nn.Linear(1, 1)
    scores = masked_nll(model, HeldOut(held, (), 3 * batches), lambda _: next(given_out))
    gold = np.concatenate([b["clean"][b["row"], b["column"]].numpy() for b in held])
    p = torch.cat(answers).float().double().softmax(1).numpy()
    own, best = p[np.arange(len(gold)), gold], p.argmax(1)
    size = np.concatenate([b["bytes"].numpy() for b in held])
    text = size > 0
    wanted = {"nll": -np.log(own).mean(), "accuracy": (best == gold).mean()}
    wanted["confidence"] = p.max(1).mean()
    wanted["bits_per_byte"] = -np.log(own[text]).sum() / math.log(2) / max(1, size.sum())
    wanted["text_accuracy"] = (best == gold)[text].sum() / max(1, text.sum())
    assert scores == pytest.approx(wanted, rel=1e-5)
    assert model.training
