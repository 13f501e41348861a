"""How the embedded models are trained, and that what ships is what the demo takes it for."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pipelines.recipes import read
from pipelines.tools.tiny_models import STUDENT, TOKENIZERS, noised_batch, train_on
from shared.aligned.examples import Preparer
from shared.models.checkpoint import open_checkpoint, resolve
from shared.models.loading import new_model
from shared.settings.config import LengthConfig, StudentConfig
from shared.text.tokenizers import Tokenizer
from student_train.training.heldout import student_predictor
from tests.plain_masks import block_diffusion_batch
from tests.shared.aligned.test_examples import chat


def test_a_students_training_is_cross_entropy_under_the_block_mask_and_learns() -> None:
    tokenizer = Tokenizer.load(TOKENIZERS["cross"])
    mask = tokenizer.special_id("mask")
    shape = StudentConfig(hidden_size=16, layers=2, intermediate_size=32)
    sizes: dict[str, Any] = {
        "shape": shape,
        "lengths": LengthConfig(student=64, teacher=64),
        "epochs": 60,
        "warmup": 5,
    }
    config = dataclasses.replace(STUDENT, **sizes, smallest_time=0.5, precision="float32")
    texts = ["x = 1", "def f(x):\n    return x + 1", "y = [i for i in range(10)]"]
    preparer = Preparer(tokenizer, None, config.lengths, mask)
    examples = preparer.usable([chat(text) for text in texts])
    torch.manual_seed(0)
    student: Any = new_model(shape, tokenizer, mask, 64)
    predict = student_predictor(student, config.lengths.block)
    batch = noised_batch(examples, 0, mask, config)
    n, length = batch["clean"].shape
    both = torch.cat([batch["noised"], batch["clean"]], 1)
    places, seen = torch.arange(length), block_diffusion_batch(batch["valid"], config.lengths.block)
    out = student(input_ids=both, attention_mask=seen, position_ids=places.repeat(n, 2))
    hidden = batch["noised"] == mask
    before = F.cross_entropy(predict(batch), batch["gold"])
    expected = F.cross_entropy(out.logits[:, :length][hidden], batch["clean"][hidden])
    torch.testing.assert_close(before, expected, rtol=1e-5, atol=1e-6)
    assert train_on(student, predict, examples, mask, config) == 60
    with torch.no_grad():
        assert F.cross_entropy(predict(batch), batch["gold"]) < before / 1.5


@pytest.mark.parametrize("prefix", ["", "half-"])
@pytest.mark.parametrize("kind", ["cross", "shared"])
def test_the_students_that_ship_are_what_the_recipes_start_from(prefix: str, kind: str) -> None:
    folder = Path(resolve(f"embedded:student_train/tiny_students/{prefix}{kind}"))
    checkpoint, tokenizer = open_checkpoint(str(folder)), Tokenizer.load(folder)
    assert tokenizer.fingerprint == Tokenizer.load(TOKENIZERS[kind]).fingerprint
    assert checkpoint.config["block_size"] == 32
    assert checkpoint.config["mask_token_id"] == tokenizer.special_id("mask")
    assert (folder / "model.safetensors").stat().st_size < 4e6
    family = f"{prefix or 'tiny-'}{kind}"
    for name in (name for name in read.packaged_recipes() if name.startswith(family)):
        recipe = read.packaged_recipe(name)
        start = read.train_config(None, recipe, []).student.checkpoint
        assert start == f"embedded:student_train/tiny_students/{prefix}{kind}"
        assert read.cache_config(None, recipe, []).teacher == f"tiny-{kind}"
