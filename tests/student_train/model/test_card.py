"""A finished student's folder is complete: whoever gets it knows what it is, and nothing of the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.cache.manifest import load_manifest
from student_train.training.trainer import train_student
from student_train.using.load import load_for_use
from tests.student_train.training.test_trainer import config


def test_a_finished_students_folder_is_complete(caches: dict[str, Path], tmp_path: Path) -> None:
    cache = caches["tiny-shared"]
    train_student(config(cache, tmp_path / "r", max_steps=2, distillation={"type": "kl"}))
    folder = tmp_path / "r" / "model"
    card: Any = ModelCard.load(folder / "README.md")
    manifest = load_manifest(cache)
    assert card.data.library_name == "transformers" and "block-diffusion" in card.data.tags
    text = (folder / "README.md").read_text()
    for words in (
        manifest.digest,
        "tiny-shared",
        "`generate()` would decode from left to right",
        "| nll |",
    ):
        assert words in text
    assert str(tmp_path) not in text and str(cache) not in text
    settings = json.loads(text.partition("```json\n")[2].partition("\n```")[0])
    assert settings["distillation"]["type"] == "kl"
    known = AutoModelForCausalLM.from_pretrained(folder).config
    assert (known.block_size, known.mask_token_id) == (32, manifest.fingerprint.student.mask_id)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert load_for_use(str(folder), "cpu").block == 32
