from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shared.system.errors import TideError
from student_train.model.export import export_student
from tests.conftest import STUDENT_TOKENIZER


@pytest.fixture
def reference(golden: Path, tmp_path: Path) -> Path:
    """The reference's own tiny student, with a tokenizer beside it."""
    folder = tmp_path / "reference"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(golden / "a2d_qwen3" / name, folder / name)
    for file in STUDENT_TOKENIZER.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def test_the_round_trip_keeps_every_bit(reference: Path, tmp_path: Path) -> None:
    export_student(reference, tmp_path / "hf", "hf")
    export_student(tmp_path / "hf", tmp_path / "a2d", "a2d")
    before, after = (
        load_file(reference / "model.safetensors"),
        load_file(tmp_path / "a2d" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    old, new = (json.loads((f / "config.json").read_text()) for f in (reference, tmp_path / "a2d"))
    for name in ("model_type", "architectures", "vocab_size", "hidden_size", "num_hidden_layers", "head_dim",
                 "rope_theta", "tie_word_embeddings", "mask_token_id", "num_key_value_heads"):  # fmt: skip
        assert new[name] == old[name], name


def test_transformers_loads_the_a2d_layout_and_its_config_has_the_references_keys(
    reference: Path, golden: Path, tmp_path: Path
) -> None:
    export_student(reference, tmp_path / "hf", "hf")
    export_student(tmp_path / "hf", tmp_path / "a2d", "a2d")
    written = json.loads((tmp_path / "a2d" / "config.json").read_text())
    stored = load_file(tmp_path / "a2d" / "model.safetensors")
    assert written["dtype"] == str(stored["lm_head.weight"].dtype).removeprefix("torch.")
    known = json.loads((golden / "a2d_qwen3" / "config.json").read_text())
    for name, value in written.items():
        if name in known and name not in (
            "transformers_version",
            "dtype",
            "_name_or_path",
            "use_cache",
        ):
            assert value == known[name], name
    # transformers knows no a2d-qwen3: what it calls the same model loads these very files.
    (tmp_path / "a2d" / "config.json").write_text(json.dumps({**written, "model_type": "qwen3"}))
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "a2d", output_loading_info=True)
    model, report = loaded
    assert (
        not report["missing_keys"]
        and not report["unexpected_keys"]
        and not report["mismatched_keys"]
    )
    expected = load_file(golden / "a2d_qwen3" / "expected.safetensors")
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    with torch.no_grad():
        logits = model.eval()(input_ids=expected["noised_ids"], attention_mask=mask).logits
    torch.testing.assert_close(logits, expected["logits_full_attention"], rtol=0, atol=1e-5)


def test_transformers_loads_the_hf_layout_and_computes_the_same(
    reference: Path, golden: Path, tmp_path: Path
) -> None:
    export_student(reference, tmp_path / "hf", "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    expected = load_file(golden / "a2d_qwen3" / "expected.safetensors")
    ids = expected["noised_ids"]
    mask = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits, expected["logits_full_attention"], rtol=0, atol=1e-5)


def test_what_is_no_student_or_would_be_overwritten_is_refused(
    reference: Path, golden: Path, tmp_path: Path
) -> None:
    with pytest.raises(TideError, match="model_type 'Dream'"):
        export_student(golden / "dream", tmp_path / "x", "hf")
    with pytest.raises(TideError, match="is not empty"):
        export_student(reference, reference, "a2d")
