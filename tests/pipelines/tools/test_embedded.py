"""How the embedded models are trained, and that what ships is what the demo takes it for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipelines.recipes.read import (
    cache_config,
    packaged_recipe,
    packaged_recipes,
    read_recipe,
    train_config,
)
from pipelines.tools.corpus import NoisedBatches
from pipelines.tools.optimizer import MuonWithAdamW
from pipelines.tools.tiny_student import TOKENIZERS, TinyStudentConfig, TinyStudentTrainer
from shared.aligned.examples import Preparer
from shared.data import ChatExample
from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import new_model
from shared.settings.config import LengthConfig, StudentConfig
from shared.text.tokenizers import Tokenizer
from tests.plain_masks import block_diffusion_batch, repeat_positions
from tests.shared.aligned.test_examples import chat


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"embed": nn.Embedding(7, 6), "inner": nn.Linear(6, 6, bias=False), "norm": nn.LayerNorm(6)}
    )


def run(
    own: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, steps: int, first: int = 0
) -> None:
    for step in range(first, first + steps):
        torch.manual_seed(step)
        x = own["norm"](own["inner"](own["embed"](torch.randint(7, (5,)))))  # type: ignore[index]
        optimizer.zero_grad()
        (x * torch.randn_like(x)).sum().backward()
        optimizer.step()
        schedule.step()


def test_both_optimizers_step_follow_one_schedule_and_resume_exactly() -> None:
    def begin(own: nn.Module) -> tuple[MuonWithAdamW, Any]:
        optimizer = MuonWithAdamW(own, 0.1, 0.01, (0.9, 0.98))
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    whole, parts = model(), model()
    before = {name: p.detach().clone() for name, p in whole.named_parameters()}
    run(whole, *begin(whole), 6)
    assert all(not torch.equal(p, before[name]) for name, p in whole.named_parameters())
    optimizer, schedule = begin(parts)
    run(parts, optimizer, schedule, 3)
    states = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    optimizer, schedule = begin(parts)
    optimizer.load_state_dict(states[0])
    schedule.load_state_dict(states[1])
    assert {group["lr"] for group in optimizer.param_groups} == {0.1 / 4}
    run(parts, optimizer, schedule, 3, 3)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_students_loss_is_cross_entropy_under_the_block_mask() -> None:
    tokenizer, config = Tokenizer.load(TOKENIZERS["cross"]), TinyStudentConfig(length=64, epochs=1)
    mask = tokenizer.special_id("mask")
    lengths = LengthConfig(64, 64, 32)
    texts = ["x = 1", "def f(x):\n    return x + 1", "y = [i for i in range(10)]"]
    examples: list[ChatExample] = [chat(text) for text in texts]
    train = Preparer(tokenizer, None, lengths, mask).usable(examples)
    batch = NoisedBatches(train, mask, config)[0]
    torch.manual_seed(0)
    student: Any = new_model(
        StudentConfig(hidden_size=16, layers=2, intermediate_size=32), tokenizer, mask, 64
    )
    trainer = TinyStudentTrainer.__new__(TinyStudentTrainer)
    loss = TinyStudentTrainer.compute_loss(trainer, student, batch)
    rows = batch["targets"] >= 0
    clean = torch.where(rows, batch["targets"], batch["ids"])
    n, length = clean.shape
    logits = student(
        input_ids=torch.cat([batch["ids"], clean], 1),
        attention_mask=block_diffusion_batch(batch["valid"], 32),
        position_ids=repeat_positions(length, n),
    ).logits[:, :length]
    torch.testing.assert_close(
        loss, F.cross_entropy(logits[rows], clean[rows]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["cross", "shared"])
def test_the_students_that_ship_are_what_the_recipes_start_from(kind: str) -> None:
    folder = Path(resolve(f"embedded:student_train/tiny_students/{kind}"))
    checkpoint, tokenizer = open_checkpoint(str(folder)), Tokenizer.load(folder)
    assert tokenizer.fingerprint == Tokenizer.load(TOKENIZERS[kind]).fingerprint
    assert checkpoint.config["block_size"] == 32
    assert checkpoint.config["mask_token_id"] == tokenizer.special_id("mask")
    assert (folder / "model.safetensors").stat().st_size < 4e6
    assert "Held-out masked NLL" in (folder / "README.md").read_text()
    for recipe in (r for r in packaged_recipes() if r.startswith(f"tiny-{kind}")):
        start = train_config(None, packaged_recipe(recipe), []).student.checkpoint
        assert start == f"embedded:student_train/tiny_students/{kind}"
        assert cache_config(None, packaged_recipe(recipe), []).teacher == f"tiny-{kind}"
        assert (
            read_recipe(packaged_recipe(recipe))["cache"]
            == read_recipe(packaged_recipe(f"tiny-{kind}"))["cache"]
        )
