"""A student's folder, as a run leaves it and in both layouts, is loaded again by transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.cache.manifest import load_manifest
from shared.system.errors import TideError
from student_train.export import export_student
from student_train.training.trainer import train_student
from student_train.using.student import load_for_use
from tests.conftest import STUDENT_TOKENIZER
from tests.student_train.training.test_trainer import config


@pytest.fixture
def reference(golden: Path, tmp_path: Path) -> Path:
    """The reference's own tiny student, with a tokenizer beside it."""
    folder = tmp_path / "reference"
    shutil.copytree(golden / "a2d_qwen3", folder)
    shutil.copytree(STUDENT_TOKENIZER, folder, dirs_exist_ok=True)
    return folder


def test_both_layouts_keep_every_bit_and_compute_the_references_logits(
    reference: Path, tmp_path: Path
) -> None:
    export_student(reference, tmp_path / "hf", "hf")
    export_student(tmp_path / "hf", tmp_path / "a2d", "a2d")
    before, after = (load_file(f / "model.safetensors") for f in (reference, tmp_path / "a2d"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    path = tmp_path / "a2d" / "config.json"
    known = json.loads((reference / "config.json").read_text())
    written = json.loads(path.read_text())
    for name in known.keys() & written.keys() - {"transformers_version", "dtype", "use_cache"}:
        assert written[name] == known[name] or name == "_name_or_path", name
    assert {"rope_theta", "head_dim", "mask_token_id", "architectures"} <= written.keys()
    assert written["dtype"] == str(after["lm_head.weight"].dtype).removeprefix("torch.")
    # transformers knows no a2d-qwen3: what it calls the same model loads these very files.
    path.write_text(json.dumps({**written, "model_type": "qwen3"}))
    expected = load_file(reference / "expected.safetensors")
    for layout in ("hf", "a2d"):
        folder = tmp_path / layout
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)  # type: ignore
        assert not any(report[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
        with torch.no_grad():
            full = torch.ones(2, 1, 16, 16, dtype=torch.bool)
            logits = model.eval()(expected["noised_ids"], attention_mask=full).logits
        torch.testing.assert_close(logits, expected["logits_full_attention"], rtol=0, atol=1e-5)


def test_what_is_no_student_or_would_be_overwritten_is_refused(
    reference: Path, golden: Path, tmp_path: Path
) -> None:
    with pytest.raises(TideError, match="Dream"):
        export_student(golden / "dream", tmp_path / "x", "hf")
    with pytest.raises(TideError, match=reference.name):
        export_student(reference, reference, "a2d")


def test_a_finished_students_folder_is_complete_and_says_nothing_of_the_machine(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    cache = caches["tiny-shared"]
    train_student(config(cache, tmp_path / "r", max_steps=2, distillation={"type": "kl"}))
    folder, manifest = tmp_path / "r" / "model", load_manifest(cache)
    card: Any = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and "block-diffusion" in card.data.tags
    text = (folder / "README.md").read_text()
    for words in (manifest.digest, "tiny-shared", "| nll |"):
        assert words in text
    assert str(tmp_path) not in text and str(cache) not in text
    settings = json.loads(text.partition("```json\n")[2].partition("\n```")[0])
    assert settings["distillation"]["type"] == "kl"
    stored = AutoModelForCausalLM.from_pretrained(folder).config
    assert (stored.block_size, stored.mask_token_id) == (32, manifest.fingerprint.student.mask_id)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert load_for_use(str(folder), "cpu").block == 32
